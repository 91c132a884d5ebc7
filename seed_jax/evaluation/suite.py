"""What every suite is given, and what it gives back."""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from seed_jax import drawing, inference, model_dir, seed_opt
from seed_jax.data import annotations
from seed_jax.data.annotations import AnnotatedPictures
from seed_jax.data.sources import Part, Source, open_source
from seed_jax.diffusion import StableDiffusion
from seed_jax.drawing import Shown
from seed_jax.evaluation import fid, perceptual, tables
from seed_jax.evaluation.encoders import Encoder, open_encoder
from seed_jax.evaluation.journal import Journal
from seed_jax.models.layers import Compute
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.pieces import Pieces
from seed_jax.seed_opt import SeedOPT
from seed_jax.tasks import PRECISIONS, causal_qformer

T = TypeVar("T")

PIECES = "pieces"


class Measured(NamedTuple):
    """What a suite found.

    Attributes:
      figures: as they go to results.json.
      benchmark: which of the paper's data sets they are of, if of one.
      sheets: of pictures, by name.
    """

    figures: dict[str, Any]
    benchmark: str | None = None
    sheets: Mapping[str, Sequence[Shown]] = {}


class Suite(NamedTuple):
    """What a suite measures, and how its figures read.

    Attributes:
      table: figures and their 'benchmark' to Markdown.
      headline: the same to the few lines that stand for the suite beside others.
      needs: what the model has to be able to do.
    """

    measure: Callable[["Evaluation"], Measured]
    table: Callable[[dict[str, Any]], str]
    headline: Callable[[dict[str, Any]], list[tables.Line]]
    needs: Literal["encoder", "codes", "words"]


class Evaluation:
    """A model and data, opened when a suite first asks for them and shared by all that do."""

    def __init__(self, args: argparse.Namespace, folder: Path | None):
        """`folder` is where suites leave rows, so that they go on after an interruption.

        Raises:
          UserError: there is no model directory.
        """
        self.args = args
        self._folder = folder
        self._made: dict[Callable, Any] = {}
        self.description = model_dir.describe(args.model)
        self._words = self.description["kind"] == seed_opt.KIND
        # The tokenizer that a language model reads with lies in its directory.
        self.tokenizer_path = Path(args.model) / "tokenizer" if self._words else Path(args.model)

    @cached_property
    def source(self) -> Source:
        """The pictures and their captions.

        Raises:
          UserError: see `open_source` and `annotations.open_annotations`.
        """
        args = self.args
        if not annotations.is_annotation_file(args.data):
            return open_source(args.data, args.split)
        return annotations.open_annotations(
            Path(args.data),
            args.images,
            args.split,
            captions=args.captions,
            allow_missing=args.allow_missing,
        )

    @cached_property
    def few(self) -> Source:
        """What is drawn or written about: the pictures, or --limit of them, spread evenly."""
        return spread(self.source, self.args.limit)

    @property
    def benchmark(self) -> str | None:
        """Which of the paper's data sets the pictures are, if they are one."""
        source = self.source
        return source.benchmark if isinstance(source, AnnotatedPictures) else None

    @cached_property
    def embedded(self) -> inference.Embeddings:
        """All pictures and captions in the contrastive space."""
        args = self.args
        return inference.embed(
            self.tokenizer_path,
            self.source,
            batch_size=args.batch_size,
            max_tags=args.max_tags,
            tokenizer=self.tokenizer if self._has_codes() else None,
            kept=self.pieces("retrieval"),
        )

    @cached_property
    def tokenizer(self) -> SeedTokenizer:
        """The tokenizer, of a suite that needs codes."""
        return SeedTokenizer.from_pretrained(self.tokenizer_path)

    @cached_property
    def runner(self) -> inference.Runner:
        """Runs the tokenizer."""
        return inference.Runner(self.tokenizer)

    @cached_property
    def diffusion(self) -> StableDiffusion:
        """What draws from codes; see `drawing.open_diffusion`."""
        return drawing.open_diffusion(self.args, self.tokenizer, self.tokenizer_path)

    @cached_property
    def encoder(self) -> Encoder:
        """What pictures and texts are compared by; see `open_encoder`."""
        return open_encoder(
            self.args.image_encoder, self.tokenizer, self.runner, self.tokenizer_path
        )

    @cached_property
    def inception(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """What FID looks with; None without --inception. See `fid.open_inception`."""
        return fid.open_inception(self.args.inception) if self.args.inception else None

    @cached_property
    def lpips(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """LPIPS; None without --lpips. See `perceptual.open_lpips`."""
        return perceptual.open_lpips(*self.args.lpips) if self.args.lpips else None

    @cached_property
    def seed_opt(self) -> SeedOPT:
        """The language model, of a suite that needs words."""
        compute = Compute(PRECISIONS[self.args.precision])
        return SeedOPT.from_pretrained(self.args.model, compute=compute, tokenizer=self.tokenizer)

    def _has_codes(self) -> bool:
        return self.description["kind"] != causal_qformer.KIND

    def misfit(self, suite: Suite) -> str:
        """Why a suite can't measure this model; '' if it can."""
        able = {"encoder": True, "codes": self._has_codes(), "words": self._words}
        if able[suite.needs]:
            return ""
        kind = self.description["kind"]
        stage = {"codes": "2 or 3", "words": "3"}[suite.needs]
        return (
            f"{self.args.model} holds a {kind} model, which has no {suite.needs}; name a model "
            f"directory of stage {stage}"
        )

    def once(self, make: Callable[["Evaluation"], T]) -> T:
        """What a function makes of this evaluation, made once for all suites that ask for it."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def settings(self) -> dict[str, Any]:
        """All that figures depend on, for results.json: options, and hashes of the weights."""
        options = {
            name: value
            for name, value in sorted(vars(self.args).items())
            if name not in ("suite", "output", "overwrite")
        }
        options = json.loads(json.dumps(options, default=str))  # paths
        described = {"kind": self.description["kind"], "hash": self.description["content_hash"]}
        if self._words:
            described["tokenizer_hash"] = self.description["tokenizer_hash"]
        return {"options": options, "model": described}

    def journal(self, name: str) -> Journal:
        """Rows of a suite, those of an interrupted run among them unless all is to be new."""
        path = self._folder / f"{name}.jsonl" if self._folder else None
        if path and self.args.overwrite:
            path.unlink(missing_ok=True)
        return Journal(path, self._fingerprint())

    def pieces(self, name: str) -> Pieces:
        """Pieces of a suite's work, under the same terms."""
        folder = self._folder / PIECES / name if self._folder else None
        # They are cut by batches, and these by devices.
        devices = f"{jax.local_device_count()} devices"
        return Pieces(folder, f"{self._fingerprint()}, {devices}", anew=self.args.overwrite)

    def _fingerprint(self) -> str:
        text = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def spread(source: Source, limit: int) -> Source:
    """`limit` records spread evenly over a source; all for 0 or more than there are."""
    if not 0 < limit < len(source):
        return source
    return Part(source, evenly(len(source), limit).tolist())


def evenly(total: int, count: int) -> np.ndarray:
    """`count` places spread evenly over `total`; all where there are no more."""
    return np.unique(np.linspace(0, total - 1, count).astype(int))
