"""Pictures to features: what stage 2 would have its frozen networks make of them at every step.

    python -m seed_jax.tokenize --features --model STAGE1 --teacher SD_DIR --images PATH \
        --views N --output FOLDER

Stage 2 then trains from FOLDER with `--config.data.features=FOLDER`; `data/features.py` has the
format.
"""

import argparse
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seed_jax import inference, model_dir, shard_pass
from seed_jax.cli import UserError
from seed_jax.data import pipeline
from seed_jax.data.features import FORMAT, SUFFIX, Features, Settings
from seed_jax.data.pipeline import Drawing
from seed_jax.data.sources import Part, Source, check_name, open_source, write_rows
from seed_jax.data.text import TextField, load_tokenizer
from seed_jax.interop import clip_weights
from seed_jax.models import teacher
from seed_jax.models.layers import Array, Compute
from seed_jax.models.teacher import TextTeacher
from seed_jax.models.tokenizer import CausalEncoder, EncoderConfig
from seed_jax.shard_pass import Pass, Shard, Write, Written
from seed_jax.tasks import PRECISIONS, causal_qformer


class Frozen(nnx.Module):
    """What stage 2 does not train."""

    def __init__(self, encoder: CausalEncoder, text_teacher: TextTeacher):
        self.encoder = encoder
        self.teacher = text_teacher

    def __call__(self, images: Array, ids_BT: Array) -> tuple[Array, Array]:
        """Causal embeddings [B, Q, D] and text states [B, T, W], float16."""
        made = self.encoder.causal_embeddings(images), self.teacher(ids_BT)
        return made[0].astype(jnp.float16), made[1].astype(jnp.float16)


def run(args: argparse.Namespace) -> None:
    """Writes the features of every picture; see `shard_pass.run`.

    Raises:
      UserError: bad paths or options, a picture without caption, embeddings beyond float16.
    """
    if args.teacher is None:
        raise UserError("--features needs --teacher DIR; '' is the packaged text encoder")
    if len(args.crop_scale) not in (0, 2):
        raise UserError("--crop-scale takes two numbers, or none for whole pictures")
    encoder = model_dir.load_config(args.model, causal_qformer.KIND, EncoderConfig)
    text = teacher.load_config(args.teacher)
    settings = Settings(
        model=model_dir.describe(args.model)["content_hash"],
        teacher=clip_weights.text_encoder_hash(args.teacher),
        precision=args.precision,
        image_size=encoder.vit.image_size,
        views=args.views,
        seed=args.seed,
        drawing=Drawing(tuple(args.crop_scale), not args.no_flip, args.max_tags, args.drop_caption),
        split=args.split or "",
        causal=(encoder.qformer.queries, encoder.qformer.width),
        states=(text.max_position_embeddings, text.hidden_size),
    )
    source = open_source(args.images, args.split)
    work = Pass(
        args.output,
        FORMAT,
        content="features",
        suffix=SUFFIX,
        source=source,
        settings=dataclasses.asdict(settings),
        records_per_shard=args.records_per_shard,
        max_unreadable=args.max_unreadable,
    )
    shard_pass.run(work, shard_pass.share(args), lambda: writer(args, settings, source))


def writer(args: argparse.Namespace, settings: Settings, source: Source) -> Write:
    """What writes a shard, with the networks loaded."""
    dtype = PRECISIONS[args.precision]
    compute = Compute(dtype)
    encoder = model_dir.load(
        args.model, causal_qformer.KIND, EncoderConfig, CausalEncoder, compute, stored=dtype
    )
    folder, subfolder = teacher.locate(args.teacher, "tokenizer")
    field = TextField(load_tokenizer(folder, subfolder=subfolder), settings.states[0])
    runner = inference.Runner(
        Frozen(encoder, clip_weights.open_text_encoder(args.teacher, compute))
    )
    apply = runner.compile(Frozen.__call__)

    def write(shard: Shard) -> Written:
        batches = pipeline.view_batches(
            Part(source, shard.numbers),
            batch_size=runner.batch_size(-(-args.batch_size // settings.views)),
            views=settings.views,
            image_size=settings.image_size,
            texts={"prompt": field},
            drawing=settings.drawing,
            seed=settings.seed,
            first=shard.numbers.start,
            workers=args.workers,
        )

        def rows() -> Iterator[bytes]:
            for batch in batches:
                causal, states = jax.device_get(apply(batch["image"], batch["prompt"]))
                for features in of_pictures(batch, causal, states, settings.views, shard, source):
                    yield from features.rows()
                shard.tell(int(batch["index"].max()) + 1, batches.unreadable)

        try:
            records = write_rows(shard.path, rows()) // (2 * settings.views)
            return Written(records, batches.unreadable)
        finally:
            batches.close()

    return write


def of_pictures(
    batch: pipeline.Batch,
    causal_BQD: np.ndarray,
    states_BTW: np.ndarray,
    views: int,
    shard: Shard,
    source: Source,
) -> Iterator[Features]:
    """The features of the pictures in a batch of `pipeline.view_batches`.

    Raises:
      UserError: a number is not finite, or a picture's name not UTF-8.
    """
    for row in np.flatnonzero(batch["valid"]):
        name = source.name(shard.numbers[int(batch["index"][row])])
        check_name(name)
        part = slice(row * views, (row + 1) * views)
        _, first, caption = np.unique(
            batch["prompt"][part], axis=0, return_index=True, return_inverse=True
        )
        features = Features(
            name, causal_BQD[part], states_BTW[part][first], caption.reshape(-1).tolist()
        )
        if not (np.isfinite(features.causal).all() and np.isfinite(features.states).all()):
            raise UserError(
                f"{name}: its features are not finite in float16; run the networks in another "
                "--precision"
            )
        yield features
