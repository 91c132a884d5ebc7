"""Runs a language model over pictures, a batch at a time, keeping what it wrote."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from seed_jax import inference
from seed_jax.cli import UserError
from seed_jax.data import transforms
from seed_jax.data.annotations import ALLOWED_MISSING
from seed_jax.evaluation.journal import Journal


class Task(NamedTuple):
    """Something to write about a picture.

    Attributes:
      id: its own.
      load: the picture, as `writer` takes it.
      text: what is asked, if anything is.
    """

    id: str
    load: Callable[[], Any]
    text: str = ""


def write(
    tasks: Sequence[Task],
    journal: Journal,
    writer: Callable[[list[Any], list[str]], list[str]],
    *,
    batch_size: int,
    what: str,
) -> dict[str, str]:
    """What the model wrote, by the tasks' ids; tasks whose picture can't be read are left out.

    Args:
      journal: has rows of earlier runs, and gets more.
      writer: pictures and texts to what is written about them.
      what: what is written, for messages.

    Raises:
      UserError: more than 1 % of the pictures can't be read.
    """
    left = [task for task in tasks if task.id not in journal.rows]
    unreadable: list[str] = []
    with tqdm(total=len(tasks), initial=len(tasks) - len(left), unit="picture", desc=what) as bar:
        for start in range(0, len(left), batch_size):
            batch, pictures = [], []
            for task in left[start : start + batch_size]:
                try:
                    pictures.append(task.load())
                    batch.append(task)
                except Exception:  # what broken files make decoders raise has no common base
                    unreadable.append(task.id)
            if batch:
                # Padded, so that one shape is compiled.
                padding = batch_size - len(batch) if len(left) > batch_size else 0
                texts = [task.text for task in batch]
                written = writer(pictures + pictures[-1:] * padding, texts + texts[-1:] * padding)
                journal.add(
                    {"id": task.id, what: text} for task, text in zip(batch, written, strict=False)
                )
            bar.update(len(left[start : start + batch_size]))
    inference.report_unreadable(unreadable)
    if len(unreadable) > ALLOWED_MISSING * len(tasks):
        raise UserError(
            f"{len(unreadable)} of {len(tasks)} pictures can't be read, more than "
            f"{100 * ALLOWED_MISSING:.0f} %; mend or remove them"
        )
    found = {task.id: journal.rows[task.id][what] for task in tasks if task.id in journal.rows}
    if empty := sum(not text.strip() for text in found.values()):
        print(f"{empty} of {len(found)} {what}s are empty, and count as wrong")
    return found


def read(picture: Path | bytes) -> Image.Image:
    """A picture, from what is encoded or the file that it is in."""
    return transforms.decode(picture if isinstance(picture, bytes) else picture.read_bytes())
