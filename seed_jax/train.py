"""Trains any stage: `python -m seed_jax.train --config configs/NAME.py --workdir DIR`.

Run it again and it goes on where it stopped. Ctrl-C (or SIGTERM) saves before it leaves. At the
end WORKDIR/model holds the model directory that the other commands load.
"""

import contextlib
import json
import math
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import jax
from absl import app, flags
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from seed_jax import cli, hosts, sharding, state
from seed_jax.checkpoint import Checkpoints, give_back_room
from seed_jax.cli import UserError, few
from seed_jax.data import features, mixture, pipeline
from seed_jax.data.batches import PipelineIterator, state_of_host
from seed_jax.data.sources import Records
from seed_jax.files import lack_of_room, replace_text
from seed_jax.metrics import MetricsWriter
from seed_jax.optim import LossScale
from seed_jax.state import TrainStep
from seed_jax.tasks import Task, picture_size
from seed_jax.tasks.autoencoder import AutoencoderKL
from seed_jax.tasks.causal_qformer import CausalQFormer
from seed_jax.tasks.codebook import Codebook
from seed_jax.tasks.diffusion import Diffusion
from seed_jax.tasks.language_model import LanguageModel
from seed_jax.tasks.seed_opt import SeedOPTTraining
from seed_jax.tasks.text_encoder import TextEncoder
from seed_jax.workdir import held

TASKS: dict[str, type[Task]] = {
    "causal_qformer": CausalQFormer,
    "codebook": Codebook,
    "text_encoder": TextEncoder,
    "language_model": LanguageModel,
    "seed_opt": SeedOPTTraining,
    "autoencoder": AutoencoderKL,
    "diffusion": Diffusion,
}


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs a config from wherever the workdir stands up to `config.steps`.

    Raises:
      UserError: the config or the data don't work, the workdir holds another run, the disk is full,
        or a loss is not finite.
    """
    task_class = find_task(config)
    try:
        with held(workdir, config):
            run(task_class, config, workdir)
    except Exception as error:
        reason = lack_of_room(error)
        if reason is None:
            raise
        newest = give_back_room(workdir / "checkpoints")
        raise UserError(
            f"{workdir}: {reason}; make room, and the same command goes on from "
            + (f"step {newest}" if newest else "the start")
        ) from error


def find_task(config: ConfigDict) -> type[Task]:
    """The stage that a config is of.

    Raises:
      UserError: there is none of its name.
    """
    if config.task not in TASKS:
        raise UserError(f"config.task is {config.task!r}; the stages are {', '.join(TASKS)}")
    return TASKS[config.task]


def run(task_class: type[Task], config: ConfigDict, workdir: Path) -> None:
    """`train` in a workdir that is this run's."""
    mesh = sharding.make_mesh(config.mesh.to_dict())
    check_batch(config, mesh)
    task = task_class(config)
    source, data = open_data(config, task, mesh)
    with contextlib.closing(data):
        hosts.agree(f"{len(source)} records in {source.path}")
        train_on(data, source, task, config, mesh, workdir)


def open_data(config: ConfigDict, task: Task, mesh: Mesh) -> tuple[Records, PipelineIterator]:
    """The training set, and this process's rows of its batches: of pictures or of features."""
    rows = sharding.local_rows(mesh, config.batch_size)
    put = partial(sharding.put_batch, mesh=mesh)
    if features.folders(config.data):
        made = features.open_training_set(config.data)
        return made, features.train_pipeline(
            made,
            batch_size=config.batch_size,
            data=config.data,
            seed=config.seed,
            rows=rows,
            put=put,
        )
    source = mixture.open_training_set(config.data)
    return source, pipeline.train_pipeline(
        source,
        batch_size=config.batch_size,
        image_size=picture_size(config),
        texts=task.text_fields(),
        data=config.data,
        seed=config.seed,
        rows=rows,
        put=put,
    )


def train_on(
    data: PipelineIterator,
    source: Records,
    task: Task,
    config: ConfigDict,
    mesh: Mesh,
    workdir: Path,
) -> None:
    """Runs the steps that are left, and writes the model."""
    graphdef, init, shardings, tx = state.lazily(task, config, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)

    # Weights come from, in this order: 1. this workdir's newest checkpoint; 2. what the task starts
    # from (an earlier stage's model directory); 3. chance.
    restored = checkpoints.restore(jax.eval_shape(init), shardings)
    if restored is not None:
        start, current, states = restored
        data.set_state(state_of_host(states, jax.process_index(), jax.process_count()))
    else:
        start, current = 0, init()
        hosts.agree("built")  # as in `compiled_everywhere`
        model = nnx.merge(graphdef, current.params, current.rest)
        first = data.get_state()
        task.prepare(model, data)
        data.set_state(first)  # what the task looked at is trained on all the same
        current = state.with_model(current, model, task, shardings)

    step_fn = state.make_train_step(task, graphdef, tx, config, shardings)
    writer = MetricsWriter(
        workdir,
        start=start,
        steps=config.steps,
        batch_size=config.batch_size,
        active=hosts.is_first(),
    )

    def look_at(step: int, metrics: dict[str, jax.Array], index_B: jax.Array) -> None:
        check_finite(step, metrics, index_B, source, workdir, precision=config.precision)
        if step % config.log_every == 0 or step == config.steps:
            writer.write(step, metrics)

    stop = StopSignal()
    step, pending = start, None
    try:
        while step < config.steps and not stop.received_before(step):
            batch = next(data)
            if step == start and jax.process_count() > 1:
                step_fn = compiled_everywhere(step_fn, current, batch)
            current, metrics = step_fn(current, batch)
            step += 1
            writer.advance()
            # Reading metrics waits for the device, so read those of the step before this one.
            if pending:
                look_at(*pending)
            pending = (step, metrics, batch["index"])
            if step % config.checkpoint_every == 0:
                look_at(*pending)  # saving waits for the step too, and should not save a NaN
                pending = None
                checkpoints.save(step, current, data.get_state())
        if pending:
            look_at(*pending)
        checkpoints.save(step, current, data.get_state())
    finally:
        writer.close()
        checkpoints.close()
    report_unreadable(data.unreadable)
    if step < config.steps:
        tell(f"stopped at step {step} and saved; the same command goes on from there")
        sys.exit(128 + stop.number)
    model = nnx.merge(graphdef, *whole(current.params, current.rest))
    if hosts.is_first():
        task.save(model, workdir / "model")
    hosts.agree("saved")
    tell(f"trained {step} steps; the model is in {workdir / 'model'}")


def compiled_everywhere(
    step_fn: TrainStep, current: state.TrainState, batch: dict[str, jax.Array]
) -> TrainStep:
    """The step, compiled in all processes before one runs it.

    The first to run would wait for the others inside of it, and gives up after half a minute.
    """
    compiled = cast(jax.stages.Wrapped, step_fn).lower(current, batch).compile()
    hosts.agree("compiled")
    return compiled


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a UserError if a count is none, or mesh and microbatches don't divide the batch."""
    for field in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
        if config[field] < 1:
            raise UserError(f"config.{field} is {config[field]}; it must be 1 or more")
    batch_size, accumulate = config.batch_size, config.accumulate
    # Pictures stay together whose captions are packed into one row.
    per_row = config.get("sequences", {}).get("per_row", 1)
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


def check_finite(
    step: int,
    metrics: dict[str, jax.Array],
    index_B: jax.Array,
    source: Records,
    workdir: Path,
    *,
    precision: str,
) -> None:
    """Raises a UserError that names the records of the batch if the step made no finite numbers.

    In float16, gradients that are not finite are skipped and the loss scale mends them, unless it
    is as low as it goes.
    """
    mended = precision == "float16" and metrics["loss_scale"] > LossScale.SMALLEST
    watched = ["loss"] if mended else ["loss", "grad_norm"]
    values = {name: float(metrics[name]) for name in watched}
    wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if not wrong:
        return
    names = [source.name(index) for index in sharding.on_host(index_B)]
    file = workdir / f"not_finite_{step}.json"
    if hosts.is_first():
        replace_text(file, json.dumps({"step": step, "records": names}, indent=2) + "\n")
    raise UserError(
        f"step {step}: {' and '.join(wrong)}, on the records {few(names)}, all in {file}; look at "
        "these, or lower config.optimizer.learning_rate"
    )


def whole(*trees: Any) -> Any:
    """Trees of arrays that any one process can write: gathered, if they lie on several."""
    return trees if jax.process_count() == 1 else sharding.on_host(trees)


def tell(line: str) -> None:
    if hosts.is_first():
        print(line)


def report_unreadable(names: list[str]) -> None:
    names = sorted({name for text in hosts.gather(json.dumps(names)) for name in json.loads(text)})
    if names:
        tell(f"{len(names)} pictures could not be read and were skipped:")
        tell("\n".join(f"  {name}" for name in names))


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can finish its step and save.

    Several processes stop at the same step, whichever of them was told to: JAX notices SIGTERM, and
    sees to it that all hear of it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._alone = jax.process_count() == 1
        signal.signal(signal.SIGINT, self._note)
        if self._alone:
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second signal is obeyed at once.
        signal.signal(number, signal.SIG_DFL)
        if self._alone:
            self.number = number
        else:
            signal.raise_signal(signal.SIGTERM)

    def received_before(self, step: int) -> bool:
        """Whether to stop instead of going on from `step`; `number` then says by which signal."""
        if not self._alone and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number > 0


USAGE = "python -m seed_jax.train --config configs/NAME.py --workdir DIR [--config.key=value ...]"
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe, such as configs/tiny_codebook.py"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the model go.")


def parse_flags(argv: list[str], *, needed: str = "workdir", usage: str = USAGE) -> list[str]:
    """absl's flag parser with the config's mistakes told in one line.

    Args:
      needed: a flag that has to be given beside --config.
      usage: the command line, told where either lacks.

    Raises:
      UserError: an unknown flag or config key, a value of the wrong type, no such config file.
    """
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None and flags.FLAGS[needed].value and not rest[1:]:
            # A file that could not be loaded raises its error here, at the first use.
            _CONFIG.value.lock()
            return rest
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise_once(" ".join(str(error).replace("\\n", " ").split()))
    raise_once(f"usage: {usage}; --help says more")


def raise_once(message: str) -> NoReturn:
    """Raises a UserError, in one process of all that were given the same command line."""
    if hosts.mistake_is_mine_to_tell():
        raise UserError(message) from None
    sys.exit(2)


def main(_: list[str]) -> None:
    with hosts.joined():
        train(_CONFIG.value, Path(_WORKDIR.value or "."))


if __name__ == "__main__":
    cli.run(lambda: app.run(main, flags_parser=parse_flags))
