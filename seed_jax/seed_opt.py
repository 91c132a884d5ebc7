"""SEED-OPT: one model that captions a picture, answers questions about it, and draws from text.

Shapes in names: B batch, T prompt tokens, Q codes of a picture.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from seed_jax import model_dir, sharding
from seed_jax.cli import UserError
from seed_jax.data import transforms
from seed_jax.data.sequences import CAPTION_PROMPT, DRAWING_PROMPT, QUESTION_PROMPT, Words
from seed_jax.data.text import load_tokenizer
from seed_jax.models import int8, lora
from seed_jax.models.generation import NOTHING, Decoding
from seed_jax.models.generator import Generator
from seed_jax.models.grammar import Grammar
from seed_jax.models.layers import Compute
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig

KIND = "seed_opt"

# A picture: pixels uint8 [H, W, 3], PIL's, or a file. Codes int [Q] stand for one as well.
Picture = np.ndarray | Image.Image | Path
# Text is a `str`; a file is a `Path`.
Prompt = Sequence[str | Picture]

# The paper's captions are of five beams.
CAPTION = Decoding(max_new=30, beams=5)
ANSWER = Decoding(max_new=10, beams=5)
# Sampled, since the likeliest codes are much alike; not so widely as text is.
DRAWING = Decoding(temperature=0.5, top_p=0.9)
FREE = Decoding(max_new=64)

# Prompts are padded to a multiple of this, so that few shapes are compiled.
PROMPT_STEP = 16


class SeedOPT:
    """A language model with a SEED tokenizer for eyes."""

    def __init__(self, model: VisualOPT, words: Words, tokenizer: SeedTokenizer):
        """`model` without adapters, or with them merged (`lora.merge`); taken apart by this."""
        self.tokenizer = tokenizer
        self.config = model.config
        self._words = words
        self._generator = Generator(model)
        graphdef, self._tokenizer_state = nnx.split(tokenizer)
        self._encode = jax.jit(lambda state, images: nnx.merge(graphdef, state).encode(images))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        compute: Compute = Compute(),
        tokenizer: SeedTokenizer | None = None,
    ) -> "SeedOPT":
        """Loads a model directory, as stage 3 of `seed_jax.train` writes it.

        Args:
          compute: its type is also what the language model's weights are stored in.
          tokenizer: of that directory, if it is loaded already.

        Raises:
          UserError: a file is missing or damaged, it holds another kind of model, or another
            tokenizer lies in it than the one it was trained with.
        """
        description = model_dir.describe_kind(path, KIND)
        folder = Path(path) / "tokenizer"
        found = model_dir.describe(folder)["content_hash"]
        if found != description["tokenizer_hash"]:
            raise UserError(
                f"{folder} is not the tokenizer that {path} was trained with (content hash "
                f"{found[:16]}, not {description['tokenizer_hash'][:16]}); its codes mean other "
                "things"
            )
        return cls(
            merged(load_language_model(path, compute=compute)),
            Words(load_tokenizer(Path(path) / "text_tokenizer")),
            tokenizer or SeedTokenizer.from_pretrained(folder),
        )

    def encode(self, pictures: Sequence[Any]) -> np.ndarray:
        """Visual codes int32 [B, Q].

        Raises:
          UserError: a file is not there, or is no picture.
        """
        size = self.tokenizer.config.encoder.vit.image_size
        images = np.stack([transforms.resize(_rgb(picture), size) for picture in pictures])
        return np.asarray(self._encode(self._tokenizer_state, images))

    def caption(
        self,
        pictures: Sequence[Picture],
        *,
        prompt: str = CAPTION_PROMPT,
        decoding: Decoding = CAPTION,
        seed: int = 0,
    ) -> list[str]:
        """A caption of each picture."""
        prompts = [[picture, prompt] for picture in pictures]
        return self._texts(prompts, decoding, seed)

    def answer(
        self,
        pictures: Sequence[Picture],
        questions: Sequence[str],
        *,
        decoding: Decoding = ANSWER,
        seed: int = 0,
    ) -> list[str]:
        """A short answer to the question asked of each picture.

        Raises:
          UserError: a question is empty, or too long.
        """
        if not all(question.strip() for question in questions):
            raise UserError("an empty question; ask something about the picture")
        prompts = [
            [picture, QUESTION_PROMPT.format(question.strip())]
            for picture, question in zip(pictures, questions, strict=True)
        ]
        return self._texts(prompts, decoding, seed)

    def draw(
        self, texts: Sequence[str], *, decoding: Decoding = DRAWING, seed: int = 0
    ) -> np.ndarray:
        """Codes of pictures drawn from texts, int32 [B, Q]; `tokenizer.embed` goes on from there.

        Raises:
          UserError: a text is empty, or too long.
        """
        config = self.config
        rows = [[*row, config.begin] for row in self._asked_to_draw(texts)]
        length = config.picture_codes + 1
        decoding = dataclasses.replace(decoding, max_new=length, min_new=0, stop=(config.end,))
        written = self._write(rows, decoding, least=length, pictures=False, seed=seed)
        return np.array([row[:-1] for row in written], np.int32) - config.opt.vocab_size

    def draws_whole(
        self, texts: Sequence[str], *, decoding: Decoding = DRAWING, seed: int = 0
    ) -> np.ndarray:
        """Whether it draws well-formed pictures by itself, held to no form, bool [B].

        One is its beginning, the codes of a picture, and its end.

        Raises:
          UserError: a text is empty, or too long.
        """
        config = self.config
        length = config.picture_codes + 2
        decoding = dataclasses.replace(
            decoding, max_new=length, min_new=0, stop=(config.end, self._words.end)
        )
        ids, mask, decoding = self._padded(self._asked_to_draw(texts), decoding, least=length)
        ids_BG = self._generator(ids, mask, decoding, seed=seed).ids
        codes_BQ = ids_BG[:, 1:-1]
        whole_B = (ids_BG[:, 0] == config.begin) & (ids_BG[:, -1] == config.end)
        return whole_B & np.all(
            (codes_BQ >= config.opt.vocab_size) & (codes_BQ < config.begin), axis=1
        )

    def _asked_to_draw(self, texts: Sequence[str]) -> list[list[int]]:
        if not all(text.strip() for text in texts):
            raise UserError("an empty text; say what to draw")
        words = self._words
        prompts = [words.encode(f"{DRAWING_PROMPT} {text.strip()}") for text in texts]
        return [[words.begin, *prompt, words.end] for prompt in prompts]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        decoding: Decoding = FREE,
        pictures: bool = True,
        seed: int = 0,
    ) -> list[list[str | np.ndarray]]:
        """Goes on from pictures and text in any order, with text and, if allowed, pictures.

        Args:
          prompts: of texts, pictures, and codes int [Q] each.
          pictures: whether the model may draw.

        Returns:
          For each prompt, texts and codes int32 [Q] in the order in which they were written.

        Raises:
          UserError: a prompt is empty or too long, or a picture can't be read.
        """
        decoding = dataclasses.replace(decoding, stop=(self._words.end,))
        written = self._write(self._ids(prompts), decoding, pictures=pictures, seed=seed)
        return [self._parts(row) for row in written]

    def stream(self, prompt: Prompt, *, decoding: Decoding = FREE, seed: int = 0) -> Iterator[str]:
        """Goes on from one prompt with text, in pieces that together are what `generate` gives.

        Raises:
          UserError: as `generate`.
        """
        decoding = dataclasses.replace(decoding, stop=(self._words.end,))
        ids, mask, decoding = self._padded(self._ids([prompt]), decoding, least=1)
        grammar = Grammar(self.config, self._words.size, pictures=False)
        told = ""
        for settled in self._generator.stream(ids, mask, decoding, grammar=grammar, seed=seed):
            row = settled[0]
            # A letter may still lack some of its bytes.
            text = self._words.decode(row[row != NOTHING].tolist()).lstrip().rstrip("\ufffd")
            if piece := text[len(told) :]:
                yield piece
                told = text

    def _texts(self, prompts: Sequence[Prompt], decoding: Decoding, seed: int) -> list[str]:
        decoding = dataclasses.replace(decoding, stop=(self._words.end,))
        written = self._write(self._ids(prompts), decoding, pictures=False, seed=seed)
        return [self._words.decode(row).strip() for row in written]

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Ids of prompts; the token for a text's beginning stands before the first text alone."""
        shown = [part for prompt in prompts for part in prompt if _is_picture(part)]
        encoded = iter(self.encode(shown) if shown else ())
        rows = []
        for prompt in prompts:
            row: list[int] = []
            for part in prompt:
                if isinstance(part, str):
                    row += [] if self._words.begin in row else [self._words.begin]
                    row += self._words.encode(part)
                else:
                    row += self._picture_ids(next(encoded) if _is_picture(part) else part)
            if not row or not any(
                part.strip() if isinstance(part, str) else True for part in prompt
            ):
                raise UserError("an empty prompt; give a picture, a text, or both")
            rows.append(row)
        return rows

    def _picture_ids(self, codes: Any) -> list[int]:
        config = self.config
        codes_Q = np.asarray(codes)
        if (
            codes_Q.shape != (config.picture_codes,)
            or not ((codes_Q >= 0) & (codes_Q < config.codes)).all()
        ):
            raise UserError(
                f"codes of shape {codes_Q.shape} from {codes_Q.min()} to {codes_Q.max()}: a "
                f"picture has {config.picture_codes} codes below {config.codes}"
            )
        return [config.begin, *(codes_Q + config.opt.vocab_size).tolist(), config.end]

    def _padded(
        self, rows: list[list[int]], decoding: Decoding, *, least: int
    ) -> tuple[np.ndarray, np.ndarray, Decoding]:
        """Rows as an array, and the decoding with no more tokens than fit after them."""
        longest = max(map(len, rows))
        room = self.config.opt.max_positions - longest
        if room < least:
            raise UserError(
                f"a prompt of {longest} tokens is too long: the model reads "
                f"{self.config.opt.max_positions}, {least} of which it has to write"
            )
        length = -(-longest // PROMPT_STEP) * PROMPT_STEP
        ids = np.full((len(rows), length), self._words.padding, np.int32)
        for number, row in enumerate(rows):
            ids[number, length - len(row) :] = row
        lengths_B1 = np.array([[len(row)] for row in rows])
        mask = np.arange(length)[None] >= length - lengths_B1
        return ids, mask, dataclasses.replace(decoding, max_new=min(decoding.max_new, room))

    def _write(
        self,
        rows: list[list[int]],
        decoding: Decoding,
        *,
        pictures: bool,
        seed: int,
        least: int = 1,
    ) -> list[list[int]]:
        ids, mask, decoding = self._padded(rows, decoding, least=least)
        grammar = Grammar(self.config, self._words.size, pictures)
        return self._generator(ids, mask, decoding, grammar=grammar, seed=seed).rows()

    def _parts(self, ids: list[int]) -> list[str | np.ndarray]:
        """Texts and codes of what was written."""
        parts: list[str | np.ndarray] = []
        size = self.config.picture_codes + 2
        while ids:
            if ids[0] == self.config.begin:
                codes, ids = ids[1 : size - 1], ids[size:]
                parts.append(np.array(codes, np.int32) - self.config.opt.vocab_size)
                continue
            end = ids.index(self.config.begin) if self.config.begin in ids else len(ids)
            if text := self._words.decode(ids[:end]).strip():
                parts.append(text)
            ids = ids[end:]
        return parts


def load_language_model(path: str | Path, *, compute: Compute = Compute()) -> VisualOPT:
    """The language model of a directory alone, its adapters beside their layers, on the host.

    Kernels that it holds in 8 bits are floats again.

    Args:
      compute: its type is also what the weights are stored in.

    Raises:
      UserError: see `model_dir.load`.
    """
    model: VisualOPT = model_dir.load(
        path,
        KIND,
        VisualOPTConfig,
        VisualOPT,
        compute,
        stored=compute.dtype,
        device=sharding.host_device(),
    )
    if not model.config.opt.int8:
        return model
    floats = _abstract(model, int8=False)
    int8.dequantize(model, floats)
    return floats


def merged(model: VisualOPT) -> VisualOPT:
    """The model with its adapters merged into the layers beneath them."""
    plain = _abstract(model, lora=LoRAConfig(rank=0))
    lora.merge(model, plain)
    return plain


def _abstract(model: VisualOPT, **changes: Any) -> VisualOPT:
    """The shapes of a model of another config of OPT."""
    config = dataclasses.replace(model.config, opt=dataclasses.replace(model.config.opt, **changes))
    compute = model.opt.compute
    return nnx.eval_shape(lambda: VisualOPT(config, compute=compute, rngs=nnx.Rngs(0)))


def _is_picture(part: Any) -> bool:
    """Whether a part of a prompt is to be encoded; text and codes are not."""
    return isinstance(part, Image.Image | Path) or (not isinstance(part, str) and part.ndim == 3)


def _rgb(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture).convert("RGB")
    if not picture.is_file():
        raise UserError(f"{picture}: no such file; name a picture")
    try:
        return transforms.decode(picture.read_bytes())
    except Exception:  # what broken files make decoders raise has no common base
        raise UserError(f"{picture} is not a picture, or a broken one") from None
