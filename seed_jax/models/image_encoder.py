"""CLIP, by which drawings, pictures and texts are compared: transformers' Flax class, in NNX."""

from typing import Any

import jax
from flax import nnx
from transformers import CLIPConfig, FlaxCLIPModel

from seed_jax.data.transforms import normalize
from seed_jax.models.layers import Array, Compute, hold_linen, nest_linen
from seed_jax.models.tokenizer import l2_normalize


class ClipEncoder(nnx.Module):
    """Pictures and texts to features of one space."""

    def __init__(self, config: CLIPConfig, *, compute: Compute, rngs: nnx.Rngs):
        model = FlaxCLIPModel(config, dtype=compute.dtype, _do_init=False)
        self.size = config.vision_config.image_size
        shapes = ((1, 1), (1, self.size, self.size, 3))
        self.params = hold_linen(model.init_weights(rngs.params(), shapes))
        self.linen = model.module

    def __call__(self, images: Array) -> Array:
        """uint8 pixels [B, size, size, 3] to float32 [B, E], L2-normalised."""

        def features(module: Any, pixels: Array) -> Array:
            _, pooled_BD, *_ = module.vision_model(pixels, return_dict=False)
            return module.visual_projection(pooled_BD)

        params = {"params": nest_linen(self.params)}
        features_BE: Any = self.linen.apply(params, normalize(images), method=features)
        return l2_normalize(features_BE)

    def text_features(self, ids_BT: Array, mask_BT: Array) -> Array:
        """Token ids int32 and mask bool [B, T] to float32 [B, E], L2-normalised."""

        def features(module: Any, ids_BT: Array, mask_BT: Array) -> Array:
            positions_BT = jax.lax.broadcasted_iota("int32", ids_BT.shape, 1)
            _, pooled_BD, *_ = module.text_model(ids_BT, mask_BT, positions_BT, return_dict=False)
            return module.text_projection(pooled_BD)

        params = {"params": nest_linen(self.params)}
        features_BE: Any = self.linen.apply(params, ids_BT, mask_BT, method=features)
        return l2_normalize(features_BE)
