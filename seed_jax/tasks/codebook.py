"""Stage 2: the codebook and the reverse Q-Former, on a frozen stage 1 (section 3.2)."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from scipy.cluster.vq import kmeans2

from seed_jax import losses, model_dir, sharding
from seed_jax.cli import UserError
from seed_jax.data import features
from seed_jax.data.text import TextField, load_tokenizer
from seed_jax.interop import clip_weights
from seed_jax.models import quantizer, teacher
from seed_jax.models.teacher import TextTeacher
from seed_jax.models.tokenizer import (
    CausalEncoder,
    EncoderConfig,
    SeedTokenizer,
    TokenizerConfig,
)
from seed_jax.tasks import PRECISIONS, Batch, causal_qformer, compute_of
from seed_jax.tasks.memory import Memory, recall

KIND = "seed_tokenizer"
# A code last seen about 1/(1 - decay) batches ago has decayed to a third of its count.
UNUSED_SHARE = 0.37
# Parts of stage 1 that make its embeddings, and those that only stage 1 uses.
NEEDLESS_BESIDE_FEATURES = ("vit", "ln_vision", "qformer", "text_proj", "temperature")


class RunningCounts(nnx.Variable):
    """How often each code came up in a batch, as a running mean, float32 [C]."""


class TeachedTokenizer(nnx.Module):
    """The tokenizer beside the text encoder whose states it learns to regress.

    Args:
      text_teacher: None where the batches hold its states.
      memory: of what stage 1 and the teacher made of the records; None runs them at each step.
    """

    def __init__(
        self, tokenizer: SeedTokenizer, text_teacher: TextTeacher | None, memory: Memory | None
    ):
        self.tokenizer = tokenizer
        self.teacher = text_teacher
        self.memory = memory
        self.counts = RunningCounts(jnp.zeros(tokenizer.config.codebook.size))


class Codebook:
    """Trains everything after the causal embeddings: 5·VQ + 2·cosine + 0.5·MSE to text states.

    Beyond the paper, `config.loss.retrieval` weighs how well the reconstructed embeddings keep the
    feature that captions are compared with.
    """

    contrastive = False

    def __init__(self, config: ConfigDict):
        self.config = config
        if not config.init:
            raise UserError(
                "config.init must name the model directory that stage 1 wrote (WORKDIR/model)"
            )
        encoder = model_dir.load_config(config.init, causal_qformer.KIND, EncoderConfig)
        if config.loss.retrieval and not encoder.contrastive_dim:
            raise UserError(
                f"{config.init} has no contrastive heads, which config.loss.retrieval goes by; set "
                "that to 0"
            )
        self.teacher_config = teacher.load_config(config.teacher)
        sizes = {"generation": {"output_dim": self.teacher_config.hidden_size}}
        for key, value in config.model.to_dict().items():
            sizes[key] = {**sizes.get(key, {}), **value} if isinstance(value, dict) else value
        self.sizes = model_dir.from_dict(
            TokenizerConfig, {"encoder": encoder, **sizes}, "config.model"
        )
        length = self.teacher_config.max_position_embeddings
        if self.sizes.generation.queries != length:
            raise UserError(
                f"config.model.generation.queries is {self.sizes.generation.queries}, but the "
                f"teacher has {length} text states"
            )
        self.features = [self._open(folder) for folder in features.folders(config.data)]
        self.text_tokenizer = load_tokenizer(str(Path(config.init) / "text_tokenizer"))
        folder, subfolder = teacher.locate(config.teacher, "tokenizer")
        self.prompt_tokenizer = load_tokenizer(folder, subfolder=subfolder)

    def _open(self, folder: str) -> features.Settings:
        """What a folder of features says of itself, if they are of use here."""
        config = self.config
        found = features.read_settings(folder)
        if config.remember:
            raise UserError(
                f"config.data.features={folder} holds what config.remember would keep; set "
                "config.remember=False"
            )
        if found.model != model_dir.describe(config.init)["content_hash"]:
            raise UserError(
                f"{folder} holds features of another stage 1 than config.init={config.init}; name "
                "that, or make them again by seed_jax.tokenize --features"
            )
        qformer, text = self.sizes.encoder.qformer, self.teacher_config
        shapes = {
            "causal embeddings": (found.causal, (qformer.queries, qformer.width)),
            "text states": (found.states, (text.max_position_embeddings, text.hidden_size)),
        }
        for what, (there, wanted) in shapes.items():
            if there != wanted:
                raise UserError(
                    f"{folder} holds {what} {there}, but config.init and config.teacher make "
                    f"{wanted}"
                )
        return found

    def build(self, *, rngs: nnx.Rngs) -> TeachedTokenizer:
        compute = compute_of(self.config)
        tokenizer = SeedTokenizer(self.sizes, compute=compute, rngs=rngs)
        if self.features:
            # Built all the same, so that chance makes what trains what it would be without them;
            # compiled, this costs nothing.
            for name in NEEDLESS_BESIDE_FEATURES:
                delattr(tokenizer.encoder, name)
            return TeachedTokenizer(tokenizer, None, None)
        return TeachedTokenizer(
            tokenizer,
            TextTeacher(self.teacher_config, compute=compute, rngs=rngs),
            self._empty_memory() if self.config.remember else None,
        )

    def _empty_memory(self) -> Memory:
        qformer, text = self.sizes.encoder.qformer, self.teacher_config
        causal = (qformer.queries, qformer.width)
        states = (text.max_position_embeddings, text.hidden_size)
        return Memory(
            self.config.data,
            {
                "causal": jax.ShapeDtypeStruct(causal, jnp.float32),
                "states": jax.ShapeDtypeStruct(states, jnp.float16),
            },
        )

    def trains(self, path: tuple) -> bool:
        return path[0] == "tokenizer" and path[1] != "encoder"

    def text_fields(self) -> dict[str, TextField]:
        return {"prompt": TextField(self.prompt_tokenizer, self.sizes.generation.queries)}

    def prepare(self, model: TeachedTokenizer, batches: Iterator[Batch]) -> None:
        encoder, config = model.tokenizer.encoder, self.config
        model_dir.load_into(encoder, config.init, causal_qformer.KIND, all_of_it=not self.features)
        if self.features and {found.teacher for found in self.features} != {
            clip_weights.text_encoder_hash(config.teacher)
        }:
            raise UserError(
                f"{config.data.features} holds text states of another text encoder than "
                f"config.teacher={config.teacher!r}; name that, or make them again by "
                "seed_jax.tokenize --features"
            )
        if model.teacher is not None:
            clip_weights.load_text_encoder(model.teacher, config.teacher)
        if model.memory is not None:
            model.memory.fill(model, self._run_frozen, batches, self.config.batch_size)
        if self.config.codebook_health.kmeans_batches:
            self._start_at_means(model, batches)

    @staticmethod
    def _run_frozen(model: Any, batch: Batch) -> dict[str, jax.Array]:
        """What is not trained here makes of pictures and captions."""
        return {
            "causal": model.tokenizer.causal_embeddings(batch["image"]),
            "states": model.teacher(batch["prompt"]),
        }

    def _known(self, model: TeachedTokenizer, batch: Batch) -> dict[str, jax.Array]:
        """Causal embeddings and text states of a batch: its own, remembered, or made here."""
        if self.features:
            causal_BQD = batch["causal"].astype(compute_of(self.config).dtype)
            return {"causal": causal_BQD, "states": batch["states"]}
        return recall(model.memory, model, self._run_frozen, batch)

    def _start_at_means(self, model: TeachedTokenizer, batches: Iterator[Batch]) -> None:
        """Puts the codes at the k-means centres of the vectors that they will quantise."""
        graphdef, state = nnx.split(model)

        @jax.jit
        def code_vectors(state: nnx.State, batch: Batch) -> jax.Array:
            model = nnx.merge(graphdef, state)
            known = self._known(model, batch)
            return model.tokenizer.code_vectors(known["causal"])

        count = self.config.codebook_health.kmeans_batches
        z_BQK = np.concatenate(
            [sharding.on_host(code_vectors(state, next(batches))) for _ in range(count)]
        )
        z_NK = z_BQK.reshape(-1, z_BQK.shape[-1])
        vectors = model.tokenizer.codebook.vectors
        if len(z_NK) < len(vectors):
            raise UserError(
                f"config.codebook_health.kmeans_batches: {count} batches hold {len(z_NK)} vectors, "
                f"fewer than the {len(vectors)} codes"
            )
        with warnings.catch_warnings():
            # An empty cluster keeps the vector of the data that it started at: good enough here.
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            means_CK, _ = kmeans2(z_NK, len(vectors), iter=10, minit="points", rng=self.config.seed)
        # Processors of other kinds round differently, and all hosts need the same.
        means_CK = multihost_utils.broadcast_one_to_all(means_CK.astype(np.float32))
        vectors[...] = jax.device_put(means_CK, vectors[...].sharding)

    def outputs(
        self, model: TeachedTokenizer, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
        """The parts of the loss; the codes and the vectors that they stand for."""
        tokenizer, weights = model.tokenizer, self.config.loss
        known = self._known(model, batch)
        causal_BQD = jax.lax.stop_gradient(known["causal"])
        z_BQK = tokenizer.code_vectors(causal_BQD)
        st_BQK, e_BQK, codes_BQ = tokenizer.codebook.quantize(z_BQK)
        x_BQD = tokenizer.dequantize(st_BQK)
        decoded_BQD = tokenizer.decode_causal(x_BQD)
        parts = {
            "loss_vq": weights.vq
            * losses.vector_quantization(
                z_BQK, e_BQK, beta=weights.beta, legacy=weights.legacy_beta
            ),
            "loss_reconstruction": weights.reconstruction
            * losses.cosine_reconstruction(decoded_BQD, causal_BQD),
            "loss_generation": weights.generation
            * losses.mean_squared_error(tokenizer.generation(x_BQD, key=key), known["states"]),
        }
        if weights.retrieval:
            parts["loss_retrieval"] = weights.retrieval * losses.cosine_reconstruction(
                tokenizer.image_features(decoded_BQD), tokenizer.image_features(causal_BQD)
            )
        return parts, (codes_BQ, z_BQK)

    def loss(
        self,
        model: TeachedTokenizer,
        batch: Batch,
        outputs: dict[str, jax.Array],
        seen: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        codes_BQ, _ = seen
        counts_C = quantizer.usage_counts(codes_BQ, self.sizes.codebook.size)
        health = quantizer.codebook_health(model.counts[...] + counts_C)
        metrics = outputs | {f"codebook_{name}": value for name, value in health.items()}
        return sum(outputs.values(), jnp.float32(0)), metrics

    def after_update(
        self, model: TeachedTokenizer, seen: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> None:
        codes_BQ, z_BQK = seen
        counts_C = quantizer.usage_counts(codes_BQ, self.sizes.codebook.size)
        health, vectors = self.config.codebook_health, model.tokenizer.codebook.vectors
        ema_C = health.decay * model.counts[...] + (1 - health.decay) * counts_C
        if health.dead_code_threshold:
            vectors[...], ema_C = quantizer.reset_dead_codes(
                vectors[...],
                ema_C,
                z_BQK.reshape(-1, z_BQK.shape[-1]),
                threshold=health.dead_code_threshold,
                key=key,
            )
        # Forget a code that did not come up once in about the last 1 / (1 - decay) batches.
        model.counts[...] = jnp.where(ema_C < UNUSED_SHARE * (1 - health.decay), 0.0, ema_C)

    def save(self, model: TeachedTokenizer, path: Path) -> None:
        if self.features:
            # In the type that it would be held in beside what trains.
            encoder = model_dir.load(
                self.config.init,
                causal_qformer.KIND,
                EncoderConfig,
                CausalEncoder,
                compute_of(self.config),
                stored=PRECISIONS[self.config.precision],
            )
            graphdef, params = nnx.split(encoder)
            # Of several processes one writes, and from a device it may write only what all hold.
            model.tokenizer.encoder = nnx.merge(graphdef, jax.tree.map(np.asarray, params))
        model_dir.save(
            path,
            kind=KIND,
            config=self.sizes,
            module=model.tokenizer,
            add_files=lambda folder: self.text_tokenizer.save_pretrained(folder / "text_tokenizer"),
        )
