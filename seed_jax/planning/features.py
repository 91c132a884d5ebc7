"""What features cost: to write them, and to read them at each step."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from seed_jax import model_dir
from seed_jax.data import features
from seed_jax.feature_pass import Frozen
from seed_jax.models import teacher
from seed_jax.models.teacher import TextTeacher
from seed_jax.models.tokenizer import CausalEncoder, EncoderConfig
from seed_jax.planning import cost
from seed_jax.planning.cost import Efficiency, Work
from seed_jax.planning.targets import Target
from seed_jax.tasks import causal_qformer, compute_of


def work_of_a_view(config: ConfigDict) -> Work:
    """What the frozen networks compute for a view of a picture and its caption."""
    sizes = model_dir.load_config(config.init, causal_qformer.KIND, EncoderConfig)
    text, compute = teacher.load_config(config.teacher), compute_of(config)

    def build() -> Frozen:
        rngs = nnx.Rngs(0)
        return Frozen(
            CausalEncoder(sizes, compute=compute, rngs=rngs),
            TextTeacher(text, compute=compute, rngs=rngs),
        )

    graphdef, weights = nnx.split(nnx.eval_shape(build))
    side = sizes.vit.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    ids = jax.ShapeDtypeStruct((1, text.max_position_embeddings), jnp.int32)
    run = jax.make_jaxpr(lambda given, *batch: nnx.merge(graphdef, given)(*batch))
    return cost.work(run(weights, images, ids).jaxpr)


def told(
    config: ConfigDict,
    step_seconds: float,
    target: Target,
    devices: int,
    share: Efficiency,
) -> list[str]:
    """Both costs in words, a line each; nothing of a config that trains from pictures."""
    folders = features.folders(config.data)
    if not folders:
        return []
    shapes = features.train_shapes(features.read_settings(folders[0]), config.batch_size)
    read = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    flops = work_of_a_view(config).flops
    hours = flops * 1e6 / (devices * target.peak[config.precision] * share.compute) / 3600
    return [
        f"features: {read / step_seconds / 1e9:.3g} GB/s are read, by all hosts together",
        f"  to write them: {flops / 1e9:.3g} GFLOP a view, {hours:.2g} hours a million views on "
        "these devices",
    ]
