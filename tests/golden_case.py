"""A folder of golden data (tests/golden/README.md says what is in it) and comparisons with it."""

import fnmatch
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from seed_jax.interop.state_dict import key_shapes, load, to_torch
from seed_jax.models.layers import Compute
from seed_jax.models.qformer import QFormerConfig
from seed_jax.models.quantizer import CodebookConfig
from seed_jax.models.tokenizer import EncoderConfig, GenerationConfig, TokenizerConfig
from seed_jax.models.vit import ViTConfig

LEFT_OUT = {
    "mask/text_decoder_with_query_past": "of the captioning decoder, which SEED never runs",
}


class Case:
    """A folder of the golden data."""

    def __init__(self, folder: Path):
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.sizes = self.manifest["config"] | self.manifest["config"]["derived"]
        self.weights = read(folder / "weights.safetensors")
        self.io = read(folder / "io.safetensors")
        # Patterns of weights that the copy in tests/golden leaves out, with what they lead to.
        self.trimmed = self.manifest.get("trimmed", [])

    def image(self) -> jax.Array | None:
        """[B, S, S, 3], normalised; None where it was left out."""
        image = self.io.get("in/image")
        return None if image is None else jnp.asarray(image.transpose(0, 2, 3, 1))

    def build(self, module_class, config, table, weights=None, zeros=()):
        """The module with the case's weights, and zeros for keys of these or trimmed patterns."""
        abstract = nnx.eval_shape(lambda: module_class(config, compute=Compute(), rngs=nnx.Rngs(0)))
        weights = self.weights if weights is None else weights
        absent = {
            key: np.zeros(shape, np.float32)
            for key, shape in key_shapes(table, nnx.state(abstract)).items()
            if matches(key, (*self.trimmed, *zeros))
        }
        return load(absent | weights, table, abstract)

    def vit(self, **sizes) -> ViTConfig:
        s = self.sizes
        defaults = {
            "image_size": s["img"],
            "patch_size": s["patch_size"],
            "width": s["vit_dim"],
            "depth": s["vit_depth"],
            "heads": s["vit_heads"],
            "mlp_dim": s["vit_mlp_hidden"],
            "epsilon": s["vit_norm_eps"],
        }
        return ViTConfig(**{**defaults, **sizes})

    def encoder(self, **sizes) -> EncoderConfig:
        s = self.sizes
        qformer = QFormerConfig(
            queries=s["num_query_token"],
            width=s["hidden"],
            depth=s["layers"],
            heads=s["heads"],
            mlp_dim=s["inter"],
            encoder_width=s["vit_dim"],
            cross_attention_every=s["cross_attention_freq"],
            epsilon=s["bert_layer_norm_eps"],
            vocab_size=s.get("vocab", 0),
            max_positions=s.get("max_pos", 512),
        )
        return EncoderConfig(vit=self.vit(), qformer=qformer, **sizes)

    def tokenizer(self, generation: GenerationConfig, *, reconstruction=True) -> TokenizerConfig:
        s = self.sizes
        return TokenizerConfig(
            encoder=self.encoder(),
            codebook=CodebookConfig(size=s["n_embed"], dim=s["code_dim"]),
            decoder_heads=s["blocks_heads"],
            decoder_depth=s["decode_depth"],
            reconstruction=reconstruction,
            generation=generation,
        )

    def compare(self, *computed: dict[str, jax.Array], patterns=("*",)) -> None:
        """Checks every stored tensor of these names, in the order of the original's computation."""
        names = {k: v for k, v in self.manifest["outputs"].items() if matches(k, patterns)}
        problems, worst = [], (0.0, "")
        for name, facts in names.items():
            stored = self.io[name if name.startswith("grad/") else f"out/{name}"]
            ours = [np.asarray(tensors[name]) for tensors in computed if name in tensors]
            if not ours and name not in LEFT_OUT:
                problems.append(f"{name} is not compared with anything")
            for value in ours:
                if value.shape != stored.shape:
                    problems.append(f"{name} has shape {value.shape}, not {stored.shape}")
                elif np.issubdtype(stored.dtype, np.integer):
                    if wrong := np.sum(value != stored):
                        problems.append(f"{name}: {wrong} of {stored.size} differ")
                else:
                    relative = 2e-5 if name.startswith("grad/") else 1e-5
                    limit = relative * facts["max_abs"] + 10 * facts["fp64_dev"]
                    error = np.max(np.abs(value - stored))
                    if not error <= limit:
                        problems.append(f"{name} is off by {error:.2e}; {limit:.2e} is allowed")
                    worst = max(worst, (error / limit if limit else 0.0, name))
        unknown = {name for tensors in computed for name in tensors} - names.keys()
        if unknown and not self.trimmed:
            problems.append(f"not in the data: {sorted(unknown)}")
        print(f"{self.manifest['case']}: worst {worst[0]:.3f} of the tolerance, {worst[1]}")
        assert not problems, "\n".join(["the first is where to look:", *problems])

    def gradients(self, grads: nnx.State, table, prefix: str = "") -> dict[str, np.ndarray]:
        """Those that are stored, under the original's keys."""
        named = {f"grad/{prefix}{k}": v for k, v in to_torch(grads, table).items()}
        return {name: v for name, v in named.items() if name in self.manifest["outputs"]}


def read(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name, from a safetensors file that may be compressed."""
    if path.exists():
        return safetensors.numpy.load_file(path)
    packed = path.with_name(f"{path.name}.gz")
    return safetensors.numpy.load(gzip.decompress(packed.read_bytes()))


def matches(key: str, patterns) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
