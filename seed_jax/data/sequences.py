"""Words and codes as the language model reads them, several sequences packed into a row.

Source: SEED, section 3.3 and figure 4. `<s>` stands before the first text; OPT's is `</s>`.

    picture to text:  [IMG] c1 … c32 [/IMG] <s> A photo of   ->  caption </s>
    text to picture:  <s> Generate an image caption </s>      ->  [IMG] c1 … c32 [/IMG]

Shapes in names: R rows, T tokens of a row, P pictures, Q codes of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from seed_jax.cli import UserError
from seed_jax.data.text import DrawnCaption
from seed_jax.models.visual_opt import VisualOPTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    # It needs pyarrow, which most of what imports this module does without.
    from seed_jax.data.codes import CodesTable

CAPTION_PROMPT = "A photo of"
QUESTION_PROMPT = "Question: {} Short answer:"
DRAWING_PROMPT = "Generate an image"


class Words:
    """Text to ids and back, without special tokens; safe in threads and cheap to pickle."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """`tokenizer`: of OPT's kind, in which spaces belong to the words behind them.

        Raises:
          UserError: it has no token for the beginning or the end of a text.
        """
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path}: this tokenizer lacks a token for the beginning or end "
                "of a text; name one of OPT's kind"
            )
        self._core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.begin, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.padding = tokenizer.pad_token_id
        self.size = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._core.decode(list(ids), skip_special_tokens=True)


@dataclass(frozen=True)
class TokenSequence:
    """Ids, of which those from `target` on are to be learned."""

    ids: list[int]
    target: int


def pack(
    groups: Sequence[Sequence[TokenSequence]], length: int, *, padding: int
) -> dict[str, np.ndarray]:
    """A row for each group, in which its sequences lie one after the other.

    Returns:
      'ids', 'segments' (the number of the sequence in its row, 0 at padding) and 'target', each
      [R, T], and 'left_out' [R], how many sequences found no room in their row.
    """
    shape = (len(groups), length)
    ids_RT = np.full(shape, padding, np.int32)
    segments_RT, target_RT = np.zeros(shape, np.int32), np.zeros(shape, bool)
    left_out_R = np.zeros(len(groups), np.int32)
    for row, group in enumerate(groups):
        start = 0
        for number, sequence in enumerate(group, 1):
            end = start + len(sequence.ids)
            if end > length:
                left_out_R[row] += 1
                continue
            ids_RT[row, start:end] = sequence.ids
            segments_RT[row, start:end] = number
            target_RT[row, start + sequence.target : end] = True
            start = end
    return {"ids": ids_RT, "segments": segments_RT, "target": target_RT, "left_out": left_out_R}


class PackedTexts:
    """Captions alone, each between `<s>` and `</s>`; a `CaptionField`."""

    def __init__(
        self,
        words: Words,
        *,
        row_length: int,
        per_row: int,
        prompts: Sequence[str] = ("",),
        hinted: float = 0.0,
    ):
        """Sets how rows are made.

        Args:
          prompts: texts of which one is drawn to stand before the caption.
          hinted: share of the texts that begin with the picture's tags, as they will with its
            codes: what follows has to be looked up in what is before it.
        """
        self._words = words
        self._row_length, self._per_row = row_length, per_row
        self._prompts = tuple(prompts)
        self._hinted = hinted

    def training_rows(
        self, name: str, drawn: Sequence[DrawnCaption], number: int
    ) -> dict[str, np.ndarray]:
        """See `CaptionField` and `pack`; each row holds `per_row` captions."""
        words, sequences = self._words, []
        for row in drawn:
            parts = [row.rng.choice(self._prompts), row.caption]
            if (tags := row.record.get("tags")) and row.rng.random() < self._hinted:
                hint = ", ".join(row.rng.sample(tags, row.rng.randint(1, len(tags))))
                parts = [hint, parts[0], row.rng.choice(row.record["captions"])]
            text = " ".join(part for part in parts if part)
            ids = [words.begin, *words.encode(text), words.end][: self._row_length]
            sequences.append(TokenSequence(ids, 1))
        packed = pack(_grouped(sequences, self._per_row), self._row_length, padding=words.padding)
        return {f"{name}_{key}": value for key, value in packed.items()}


class PackedPairs:
    """Pictures and captions as sequences, in either direction; a `CaptionField`.

    Codes that are not known yet are negative: -1 - i stands for the i-th code of the row's
    pictures, which follow each other in the batch.
    """

    def __init__(
        self,
        words: Words,
        config: VisualOPTConfig,
        *,
        row_length: int,
        per_row: int,
        caption_length: int,
        prompts: Sequence[str],
        picture_to_text_batches: int,
        drawing_share: float,
        codes: Sequence[CodesTable] = (),
    ):
        """Sets how rows are made.

        Args:
          caption_length: tokens that a caption is cut to.
          prompts: of which one is drawn to ask for a caption.
          picture_to_text_batches: so many first batches are picture to text alone.
          drawing_share: of the sequences after them that are text to picture.
          codes: of the pictures of each set; none leaves them to be filled in.
        """
        self._words, self._config = words, config
        self._row_length, self._per_row = row_length, per_row
        self._caption_length = caption_length
        self._prompts = [words.encode(prompt) for prompt in prompts]
        self._drawing = words.encode(DRAWING_PROMPT)
        self._first, self._share = picture_to_text_batches, drawing_share
        self._codes = codes
        longest = (
            config.picture_codes
            + 4
            + caption_length
            + max(map(len, [*self._prompts, self._drawing]))
        )
        for name, room in (
            ("config.sequences.row_length is", row_length),
            ("the longest text that config.opt reads has", config.opt.max_positions),
        ):
            if longest > room:
                raise UserError(
                    f"{name} {room} tokens, but a sequence can have {longest}; "
                    "config.sequences.caption_length shortens it"
                )

    def training_rows(
        self, name: str, drawn: Sequence[DrawnCaption], number: int
    ) -> dict[str, np.ndarray]:
        """See `CaptionField` and `pack`; each row holds `per_row` pairs."""
        share = self._share if number >= self._first else 0.0
        sequences = [
            self._sequence(row, index % self._per_row, share) for index, row in enumerate(drawn)
        ]
        packed = pack(
            _grouped(sequences, self._per_row), self._row_length, padding=self._words.padding
        )
        return {f"{name}_{key}": value for key, value in packed.items()}

    def _sequence(self, row: DrawnCaption, place: int, share: float) -> TokenSequence:
        config, words = self._config, self._words
        if not self._codes:
            first = place * config.picture_codes
            codes = [-1 - i for i in range(first, first + config.picture_codes)]
        else:
            known = self._codes[row.record.get("set", 0)]
            codes = [config.opt.vocab_size + code for code in known[row.record["id"]]]
        picture = [config.begin, *codes, config.end]
        caption = words.encode(f" {row.caption}")[: self._caption_length]
        if row.rng.random() < share:
            asked = [words.begin, *self._drawing, *caption, words.end]
            return TokenSequence([*asked, *picture], len(asked))
        asked = [*picture, words.begin, *row.rng.choice(self._prompts)]
        return TokenSequence([*asked, *caption, words.end], len(asked))


def _grouped(sequences: list[TokenSequence], size: int) -> list[list[TokenSequence]]:
    return [sequences[i : i + size] for i in range(0, len(sequences), size)]
