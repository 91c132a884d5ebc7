"""OPT, adapters and greedy decoding against transformers and PEFT.

    pytest tests/test_opt_parity.py --golden DIR

runs on any directory of the form that tests/golden/README.md describes.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seed_jax import losses
from seed_jax.interop import opt_weights
from seed_jax.interop.state_dict import load, to_torch
from seed_jax.models import lora
from seed_jax.models.generation import Decoding
from seed_jax.models.generator import Generator
from seed_jax.models.layers import Compute
from seed_jax.models.lora import LoRAConfig
from seed_jax.models.opt import OPT, causal_mask
from tests.golden_case import Case, read

VARIANTS = ("base", "attn", "attn_mlp")


class OPTCase(Case):
    """A base model and two sets of adapters, each in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.io = read(folder / "io.safetensors")
        self.trimmed = []
        self.ids, self.mask, self.labels = (
            jnp.asarray(self.io[f"in/{name}"], jnp.int32)
            for name in ("input_ids", "attention_mask", "labels")
        )

    def load(self, folder: str = "base") -> OPT:
        config = opt_weights.read_config(self.folder / "base")
        abstract = nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0)))
        weights = read(self.folder / folder / "model.safetensors")
        return load(weights, opt_weights.opt(config), abstract)

    def variant(self, name: str) -> OPT:
        if name == "base":
            return self.load()
        folder = self.folder / f"adapter_{name}"
        adapters = read(folder / "adapter_model.safetensors")
        return opt_weights.with_adapters(
            self.load(), adapters, opt_weights.read_peft_config(folder)
        )

    def gradients_of(self, grads: nnx.State, config, name: str) -> dict[str, np.ndarray]:
        """Those that are stored, under the original's keys."""
        prefix = "grad/base/" if name == "base" else f"grad/{name}/base_model.model."
        named = {f"{prefix}{k}": v for k, v in to_torch(grads, opt_weights.opt(config)).items()}
        if name != "base":
            adapters = to_torch(grads, opt_weights.peft(config))
            named |= {f"grad/{name}/{k}": v for k, v in adapters.items()}
        return {key: value for key, value in named.items() if key in self.manifest["outputs"]}

    def tokens_only(self, name: str, value: jax.Array) -> np.ndarray:
        """The value, with the stored one at padding, where anything may stand."""
        stored = self.io[f"out/{name}"]
        return np.where(np.asarray(self.mask, bool)[..., None], value, stored)


@pytest.fixture(scope="module")
def case(golden) -> OPTCase:
    return OPTCase(golden / "opt_lora")


def outputs(case: OPTCase, name: str) -> dict:
    model = case.variant(name)
    graphdef, params = nnx.split(model)

    def loss(params):
        model = nnx.merge(graphdef, params)
        x, inputs = model.hidden_states(model.words[...][case.ids], case.mask, outputs=True)
        logits = model.word_logits(x)
        hidden = [*inputs, x]
        return losses.mean_where(
            losses.each_token(logits, case.labels), case.labels[:, 1:] != -100
        ), (logits, hidden)

    (value, (logits, hidden)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    stored = [f"{name}/hidden_{i}" for i in range(len(hidden))]
    states = dict(zip(stored, hidden, strict=True)) if f"out/{stored[0]}" in case.io else {}
    states[f"{name}/logits"] = logits
    return {
        **{key: case.tokens_only(key, value) for key, value in states.items()},
        f"{name}/loss": value,
        **case.gradients_of(grads, model.config, name),
    }


def generated(case: OPTCase, model: OPT, name: str) -> dict:
    ids = np.asarray(case.io["in/gen_input_ids"], np.int32)
    mask = np.asarray(case.io["in/gen_attention_mask"], bool)
    new = case.io[f"out/{name}/gen_padded_tokens"].shape[1]
    generator = Generator(model)
    padded = generator(ids, mask, Decoding(max_new=new), logits=True)
    found = {f"{name}/gen_padded_tokens": padded.ids, f"{name}/gen_padded_logits": padded.logits}
    for row, (own_ids, own_mask) in enumerate(zip(ids, mask, strict=True)):
        alone = generator(own_ids[own_mask][None], None, Decoding(max_new=new))
        found[f"{name}/gen_unpadded_{row}_tokens"] = alone.ids[0]
    return found


def merged(case: OPTCase, name: str) -> dict:
    model, target = case.variant(name), case.load()
    lora.merge(model, target)
    logits = jax.jit(lambda m, *inputs: m(*inputs))(target, case.ids, case.mask)
    return {f"{name}/merged_logits": case.tokens_only(f"{name}/merged_logits", logits)}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_states_loss_and_gradients(case, name):
    case.compare(outputs(case, name), patterns=[f"grad/{name}/*", f"{name}/hidden*", f"{name}/lo*"])


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_generation_with_and_without_padding(case, name):
    case.compare(generated(case, case.variant(name), name), patterns=[f"{name}/gen_*"])


def test_merged_weights_and_what_they_compute(case):
    positions = causal_mask(case.mask).sum(-1) - 1 + 2
    case.compare({"position_indices": positions}, patterns=["position_indices"])
    for name in VARIANTS[1:]:
        case.compare(merged(case, name), patterns=[f"{name}/merged_logits"])


def test_merged_weights(case):
    folders = [name for name in VARIANTS[1:] if (case.folder / f"merged_{name}").is_dir()]
    assert folders
    for name in folders:
        target = case.load()
        lora.merge(case.variant(name), target)
        stored = read(case.folder / f"merged_{name}" / "model.safetensors")
        ours = to_torch(nnx.state(target), opt_weights.opt(target.config))
        assert ours.keys() == stored.keys()
        for key, value in stored.items():
            limit = 1e-6 * np.abs(value).max()
            np.testing.assert_allclose(ours[key], value, rtol=0, atol=limit, err_msg=key)


def test_post_norm_and_projections_as_in_opt_350m(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import OPTConfig as TorchConfig
    from transformers import OPTForCausalLM

    torch.manual_seed(0)
    original = OPTForCausalLM(
        TorchConfig(
            vocab_size=40,
            hidden_size=24,
            word_embed_proj_dim=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            ffn_dim=32,
            max_position_embeddings=16,
            do_layer_norm_before=False,
            init_std=0.3,
        )
    ).eval()
    original.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = opt_weights.load(tmp_path)
    ids = np.random.default_rng(0).integers(0, 40, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = original(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    ours = np.asarray(jax.jit(lambda m, *inputs: m(*inputs))(model, ids, jnp.asarray(mask)))
    np.testing.assert_allclose(ours[mask > 0], expected[mask > 0], rtol=0, atol=2e-5)

    # And back: what we write, transformers reads.
    opt_weights.save(model, tmp_path / "again", dtype=np.float32)
    again = OPTForCausalLM.from_pretrained(tmp_path / "again")
    for key, value in original.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key], value, err_msg=key)


def test_dropout_reaches_the_adapters_alone(case):
    base = case.load()
    dropped = LoRAConfig(rank=2, alpha=4.0, dropout=0.5, targets=("query", "down"))
    config = dataclasses.replace(base.config, lora=dropped)
    model = OPT(config, compute=Compute(), rngs=nnx.Rngs(0))
    run = jax.jit(lambda m, key: m(case.ids, case.mask, key=key))
    fresh = run(model, jax.random.key(0))
    # An adapter begins as nothing, so that there is nothing to drop yet.
    np.testing.assert_allclose(fresh, run(model, None), atol=1e-5)
    model.layers.query.lora_b[...] += 0.1
    assert np.abs(run(model, jax.random.key(0)) - run(model, jax.random.key(1))).max() > 1e-3
