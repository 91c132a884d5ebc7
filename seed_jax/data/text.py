"""Captions: which one a picture gets, and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from seed_jax.cli import UserError, first_line
from seed_jax.data.sources import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMBEDDED_TOKENIZER = Path(__file__).parents[1] / "assets" / "text_tokenizer"


def load_tokenizer(path: str | Path | None, *, subfolder: str = "") -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer: a local folder, a hub name, or None for the one packaged here.

    Args:
      subfolder: where in the folder or hub repository it lies, as in diffusers' pipelines.

    Raises:
      UserError: it can't be found, isn't a fast one, or has no padding token.
    """
    # Takes seconds, and worker processes get by without it.
    from transformers import AutoTokenizer

    wanted = EMBEDDED_TOKENIZER if path is None else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(wanted), subfolder=subfolder)
    except Exception as error:
        # It may guess a class by the folder's name and then fail in any way.
        reason = first_line(error)
        raise UserError(
            f"{wanted}: no tokenizer there; give a folder with tokenizer.json or a Hugging Face "
            f"name such as bert-base-uncased ({reason})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{wanted}: a tokenizer without tokenizer.json; save it as a fast one")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{wanted}: this tokenizer has no padding token")
    return tokenizer


class DrawnCaption(NamedTuple):
    """What a training row is made of; whatever else is to be drawn comes from its generator."""

    caption: str
    record: Record
    rng: Random


class CaptionField(Protocol):
    """Makes arrays of captions, for training; pickled where worker processes read the data."""

    def training_rows(
        self, name: str, drawn: Sequence[DrawnCaption], number: int
    ) -> dict[str, np.ndarray]:
        """The arrays of a batch, by names that begin with `name`.

        Args:
          number: the batch's, from 0.
        """


class TextField:
    """Captions to rows of `length` token ids, padded and cut on the right.

    Safe in threads and cheap to pickle: it keeps the tokenizer's own core, set up once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int):
        self.length = length
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(
            direction="right",
            length=length,
            pad_id=tokenizer.pad_token_id,
            pad_type_id=tokenizer.pad_token_type_id,
            pad_token=tokenizer.pad_token,
        )

    def __call__(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """One caption to ids int32 [T] and mask bool [T], True on tokens."""
        ids_BT, mask_BT = self.batch([caption])
        return ids_BT[0], mask_BT[0]

    def batch(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`B` captions to ids int32 [B, T] and mask bool [B, T]; several times faster a caption."""
        rows = self._tokenizer.encode_batch_fast(list(captions))
        ids_BT = np.array([row.ids for row in rows], np.int32)
        mask_BT = np.array([row.attention_mask for row in rows], bool)
        return ids_BT, mask_BT

    def named_batch(self, name: str, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays of `batch` as '<name>' and '<name>_mask'."""
        ids_BT, mask_BT = self.batch(captions)
        return {name: ids_BT, f"{name}_mask": mask_BT}

    def training_rows(
        self, name: str, drawn: Sequence[DrawnCaption], number: int
    ) -> dict[str, np.ndarray]:
        """See `CaptionField` and `named_batch`."""
        return self.named_batch(name, [row.caption for row in drawn])


def choose_caption(
    record: Record, rng: Random | None, max_tags: int, *, drop_caption: float = 0.0
) -> str:
    """One caption and up to `max_tags` of the picture's tags, joined by commas.

    Args:
      rng: draws the caption, how many tags, which and in which order; None takes the first ones.
      drop_caption: share of the draws with tags that are tags alone. Beside its caption a picture's
        tags would tell nothing more, and nothing would be learned from them.

    Raises:
      UserError: the record has no caption.
    """
    captions, tags = record["captions"], record.get("tags", [])
    if not captions:
        raise UserError(f"{record['id']} has no caption")
    most = min(max_tags, len(tags))
    if rng is None:
        return ", ".join([captions[0], *tags[:most]])
    caption = rng.choice(captions)
    drawn = rng.sample(tags, rng.randint(0, most))
    if drawn and rng.random() < drop_caption:
        return ", ".join(drawn)
    return ", ".join([caption, *drawn])
