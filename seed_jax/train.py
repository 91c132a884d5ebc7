"""Trains any stage: `python -m seed_jax.train --config configs/NAME.py --workdir DIR`.

Run it again and it goes on where it stopped. Ctrl-C (or SIGTERM) saves before it leaves. At the
end WORKDIR/model holds the model directory that the other commands load.
"""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from absl import app, flags
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from seed_jax import cli, sharding, state
from seed_jax.checkpoint import Checkpoints
from seed_jax.cli import UserError
from seed_jax.data import pipeline, sources
from seed_jax.metrics import MetricsWriter
from seed_jax.tasks import Task
from seed_jax.tasks.autoencoder import AutoencoderKL
from seed_jax.tasks.causal_qformer import CausalQFormer
from seed_jax.tasks.codebook import Codebook
from seed_jax.tasks.diffusion import Diffusion
from seed_jax.tasks.language_model import LanguageModel
from seed_jax.tasks.seed_opt import SeedOPTTraining
from seed_jax.tasks.text_encoder import TextEncoder

TASKS: dict[str, type[Task]] = {
    "causal_qformer": CausalQFormer,
    "codebook": Codebook,
    "text_encoder": TextEncoder,
    "language_model": LanguageModel,
    "seed_opt": SeedOPTTraining,
    "autoencoder": AutoencoderKL,
    "diffusion": Diffusion,
}

# What may differ between two runs in one workdir: how long, how often, and on which machines.
FREE_TO_CHANGE = {
    "steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "mesh",
    "accumulate",
}


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs a config from wherever the workdir stands up to `config.steps`.

    Raises:
      UserError: the config or the data don't work, or the workdir holds another run.
    """
    if config.task not in TASKS:
        raise UserError(f"config.task is {config.task!r}; the stages are {', '.join(TASKS)}")
    claim(workdir, config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    per_row = config.get("sequences", {}).get("per_row", 1)
    check_batch(config.batch_size, mesh, per_row=per_row, accumulate=config.accumulate)
    task = TASKS[config.task](config)
    source = sources.open_source(config.data.path, config.data.split)
    data = pipeline.train_pipeline(
        source,
        batch_size=config.batch_size,
        image_size=config.image_size,
        texts=task.text_fields(),
        data=config.data,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    graphdef, current, shardings, tx = state.create(task, config, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)

    # Weights come from, in this order: 1. this workdir's newest checkpoint; 2. what the task starts
    # from (an earlier stage's model directory); 3. chance.
    start = checkpoints.latest or 0
    if start:
        current, data_state = checkpoints.restore(start, current, shardings)
        data.set_state(data_state)
    else:
        model = nnx.merge(graphdef, current.params, current.rest)
        first = data.get_state()
        task.prepare(model, on_mesh(data, mesh))
        data.set_state(first)  # what the task looked at is trained on all the same
        current = state.with_model(current, model, task, shardings)

    step_fn = state.make_train_step(task, graphdef, tx, config, shardings)
    writer = MetricsWriter(
        workdir,
        start=start,
        steps=config.steps,
        batch_size=config.batch_size,
        active=jax.process_index() == 0,
    )
    stop = StopSignal()
    step, pending = start, None
    try:
        while step < config.steps and not stop.received:
            current, metrics = step_fn(current, sharding.put_batch(next(data), mesh))
            step += 1
            writer.advance()
            # Reading metrics waits for the device, so read those of the step before this one.
            if pending:
                writer.write(*pending)
                pending = None
            if step % config.log_every == 0 or step == config.steps:
                pending = (step, metrics)
            if step % config.checkpoint_every == 0:
                checkpoints.save(step, current, data.get_state())
        if pending:
            writer.write(*pending)
        checkpoints.save(step, current, data.get_state())
    finally:
        data.close()
        writer.close()
        checkpoints.close()
    report_unreadable(data.unreadable)
    if step < config.steps:
        print(f"stopped at step {step} and saved; the same command goes on from there")
        sys.exit(128 + stop.received)
    model = nnx.merge(graphdef, current.params, current.rest)
    task.save(model, workdir / "model")
    print(f"trained {step} steps; the model is in {workdir / 'model'}")


def on_mesh(data: Iterator[dict[str, Any]], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    for batch in data:
        yield sharding.put_batch(batch, mesh)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Notes the config in the workdir, or checks that it is the one noted there.

    Raises:
      UserError: the workdir was trained with another config.
    """
    file = workdir / "config.json"
    wanted = json.loads(config.to_json_best_effort())
    if file.exists():
        there = json.loads(file.read_text())
        differing = sorted(
            name
            for name in there.keys() | wanted.keys()
            if name not in FREE_TO_CHANGE and there.get(name) != wanted.get(name)
        )
        if differing:
            raise UserError(
                f"{workdir} was trained with another config (differs in {', '.join(differing)}); "
                "take a new --workdir, or the config it was trained with"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n")


def check_batch(batch_size: int, mesh: Mesh, *, per_row: int, accumulate: int) -> None:
    """Raises a UserError if the mesh and the microbatches don't divide the batch.

    Args:
      per_row: pictures that stay together, since their captions are packed into one row.
      accumulate: microbatches.
    """
    if accumulate < 1:
        raise UserError(f"config.accumulate is {accumulate}; 1 runs the batch at once")
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    whole = shards * per_row * accumulate
    if batch_size % whole:
        groups = f" in groups of {per_row}" if per_row > 1 else ""
        microbatches = f" of {accumulate} microbatches" if accumulate > 1 else ""
        raise UserError(
            f"config.batch_size={batch_size} can't be split over the mesh's {shards} "
            f"data shards{microbatches}{groups}; "
            f"{batch_size - batch_size % whole or whole} can"
        )


def report_unreadable(names: list[str]) -> None:
    if names:
        print(f"{len(names)} pictures could not be read and were skipped:")
        print("\n".join(f"  {name}" for name in names))


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can finish its step and save."""

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # A second signal is obeyed at once.
        signal.signal(number, signal.SIG_DFL)


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe, such as configs/tiny_codebook.py"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the model go.")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flag parser with the config's mistakes told in one line.

    Raises:
      UserError: an unknown flag or config key, a value of the wrong type, no such config file.
    """
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None and _WORKDIR.value and not rest[1:]:
            # A file that could not be loaded raises its error here, at the first use.
            _CONFIG.value.lock()
            return rest
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).replace("\\n", " ").split())) from None
    usage = (
        "python -m seed_jax.train --config configs/NAME.py --workdir DIR [--config.key=value ...]"
    )
    raise UserError(f"usage: {usage}; --help says more")


def main(_: list[str]) -> None:
    train(_CONFIG.value, Path(_WORKDIR.value or "."))


if __name__ == "__main__":
    cli.run(lambda: app.run(main, flags_parser=parse_flags))
