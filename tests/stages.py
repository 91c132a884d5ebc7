"""The three stages, small enough to compile many times, and batches for them."""

from pathlib import Path
from random import Random

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import tiny_causal_qformer, tiny_codebook, tiny_seed_opt
from seed_jax import optim, sharding, state
from seed_jax.data.text import DrawnCaption
from seed_jax.state import TrainState
from seed_jax.tasks import Task
from seed_jax.tasks.causal_qformer import CausalQFormer
from seed_jax.tasks.codebook import Codebook
from seed_jax.tasks.seed_opt import SeedOPTTraining
from tests.random_weights import random_weights
from tests.test_train import small
from tests.tiny import COLOURS, SIDE, THINGS, save_tokenizer

STAGES = ("causal_qformer", "codebook", "seed_opt")


def make(stage: str, folder: Path, **changes) -> tuple[ConfigDict, Task]:
    """A stage's config and task; stages 2 and 3 start from untrained models written to `folder`."""
    if stage == "causal_qformer":
        config = small(tiny_causal_qformer.get_config(), **changes)
        return config, CausalQFormer(config)
    if stage == "codebook":
        config = small(tiny_codebook.get_config(), init=save_first(folder), **changes)
        config.model.codebook.size = 64
        config.codebook_health.kmeans_batches = 0  # there are no batches to take them from
        return config, Codebook(config)
    init = save_tokenizer(folder / "tokenizer")
    config = small(tiny_seed_opt.get_config(), init=str(init), **changes)
    config.image_size = SIDE
    config.sequences.update(row_length=64, per_row=2)
    config.sequences.picture_to_text_steps = 0
    config.model.dropout = 0.0
    # As the published recipe has it, or nearer: the tiny one's steps blow up roundings.
    config.model.lora.update(rank=16, alpha=32.0)
    config.optimizer.learning_rate = 1e-3
    return config, SeedOPTTraining(config)


def save_first(folder: Path) -> str:
    """Writes what an untrained stage 1 leaves; the name of its folder."""
    _, task = make("causal_qformer", folder)
    task.save(random_weights(lambda: task.build(rngs=nnx.Rngs(0))), folder / "first")
    return str(folder / "first")


def start(
    config: ConfigDict, task: Task
) -> tuple[nnx.GraphDef, TrainState, optax.GradientTransformation]:
    """As by `state.lazily`, on one device, with random weights."""
    # In the wider model of stage 3, larger weights would blow up roundings within a few steps.
    deviation = 0.05 if config.task == "seed_opt" else 0.2
    model = random_weights(lambda: task.build(rngs=nnx.Rngs(0)), deviation)
    if hasattr(model, "temperature"):
        model.temperature[...] = 0.1
    tx = optim.make_optimizer(config.optimizer, config.steps)
    return nnx.graphdef(model), state.initial(task, config, tx, model), tx


def place(current: TrainState, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """A copy of the state on a mesh, and its shardings."""
    shardings = sharding.tree_shardings(current, mesh)
    # By way of the host: a step takes over the memory of its state.
    return jax.device_put(jax.tree.map(np.array, current), shardings), shardings


def batch(config: ConfigDict, task: Task, seed: int) -> dict[str, np.ndarray]:
    """Noise with captions of 1 to 7 words."""
    rng, draw = np.random.default_rng(seed), Random(seed)
    count, side = config.batch_size, config.image_size
    made = {"image": rng.integers(0, 256, (count, side, side, 3), np.uint8)}
    captions = [
        DrawnCaption(" ".join(draw.choices(COLOURS + THINGS, k=draw.randint(1, 7))), {}, draw)
        for _ in range(count)
    ]
    for name, field in task.text_fields().items():
        made |= field.training_rows(name, captions, seed)
    return made
