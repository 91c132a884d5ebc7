"""The image side of CLIP, by which drawings are compared: transformers' Flax class, in NNX."""

from typing import Any

from flax import nnx
from transformers import CLIPConfig, FlaxCLIPModel

from seed_jax.data.transforms import normalize
from seed_jax.models.layers import Array, Compute, hold_linen, nest_linen
from seed_jax.models.tokenizer import l2_normalize


class ClipImageEncoder(nnx.Module):
    """Pictures to features; holds the weights of the whole CLIP, as its files do."""

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
