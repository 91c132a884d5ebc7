"""Where a run's metrics go: the terminal, `metrics.jsonl` and TensorBoard."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from seed_jax.files import replace_text
from seed_jax.workdir import METRICS


class MetricsWriter:
    """Writes metrics from process 0; the other processes' writers do nothing.

    `metrics.jsonl` gets an object a line: `step`, `seconds` since this process began to train,
    `steps_per_second`, `pictures_per_second`, and the step's metrics.
    """

    def __init__(self, workdir: Path, *, start: int, steps: int, batch_size: int, active: bool):
        self._active = active
        self._batch_size = batch_size
        self._began = self._last_time = time.monotonic()
        self._last_step = start
        if not active:
            return
        path = workdir / METRICS
        _drop_after(path, start)
        self._file: TextIO = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One more step was dispatched."""
        if self._active:
            self._bar.update()

    def write(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Writes the metrics of `step`, with rates since the last call."""
        if not self._active:
            return
        now = time.monotonic()
        rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        values = {name: float(value) for name, value in metrics.items()}
        rates = {"steps_per_second": rate, "pictures_per_second": rate * self._batch_size}
        row = {"step": step, "seconds": now - self._began, **values, **rates}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in (values | rates).items():
            self._board.add_scalar(name, value, step)
        self._bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {rates['pictures_per_second']:.0f} pictures/s"
        )

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._board.close()
            self._file.close()


def _drop_after(path: Path, step: int) -> None:
    """Forgets lines after `step`: a run that was killed takes those steps again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # a line cut short by the kill
            continue
    replace_text(path, "".join(kept))
