"""Decoding: the cache changes nothing, beams are transformers', pictures come out whole."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seed_jax import model_dir
from seed_jax.interop import opt_weights
from seed_jax.interop.state_dict import load
from seed_jax.models import generation
from seed_jax.models.generation import NOTHING, Decoding
from seed_jax.models.generator import Generator
from seed_jax.models.grammar import Grammar
from seed_jax.models.opt import OPT, OPTConfig
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig
from tests.golden_case import read

CONFIG = VisualOPTConfig(
    opt=OPTConfig(vocab_size=21, width=16, depth=2, heads=2, mlp_dim=24, max_positions=64),
    codes=12,
    code_dim=4,
    picture_codes=5,
)
WORDS = 19  # the table has two rows more
STOP = 2

MODES = {
    "greedy": Decoding(),
    "sampling": Decoding(temperature=1.0),
    "top_k": Decoding(temperature=0.7, top_k=4),
    "top_p": Decoding(temperature=1.3, top_p=0.8),
    "repetition": Decoding(repetition_penalty=1.5),
    "min_length": Decoding(min_new=6),
    "beams": Decoding(beams=3),
    "long beams": Decoding(beams=4, length_penalty=2.0, repetition_penalty=1.2, min_new=3),
}
MODES = {name: dataclasses.replace(d, max_new=10, stop=(STOP, 7)) for name, d in MODES.items()}


class Uncached(nnx.Module):
    """The same model, which reads everything again for each token; its cache is the ids."""

    def __init__(self, model: VisualOPT):
        self.model = model

    def unstack(self):
        pass

    def empty_cache(self, batch, length):
        return jnp.zeros((batch, length), jnp.int32)

    def next_logits(self, ids_BT, positions_BT, mask_BTS, cache, at):
        cache = jax.lax.dynamic_update_slice_in_dim(cache, ids_BT, at, axis=1)
        logits = self.model(cache, mask_BTS[:, -1].astype(jnp.int32))
        last = at + ids_BT.shape[1] - 1
        return jax.lax.dynamic_index_in_dim(logits, last, 1, keepdims=False), cache


def random_model(seed: int = 0) -> VisualOPT:
    """Logits a few units apart, so that choices are clear and yet vary."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VisualOPT(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    weights = {
        name: jnp.full(a.shape, 1.0 if name.endswith("scale") else 0.0, a.dtype)
        if name.endswith(("scale", "bias"))
        else jnp.asarray(0.4 * rng.normal(size=a.shape), a.dtype)
        for name, a in model_dir.flat_params(state).items()
    }
    return nnx.merge(graphdef, model_dir.unflatten_params(state, weights))


def prompts(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts of 3 to 6 tokens, words and codes, some of which end in [IMG]."""
    rng = np.random.default_rng(count)
    ids = rng.integers(0, CONFIG.begin, (count, 6))
    mask = np.arange(6)[None] >= rng.integers(0, 4, count)[:, None]
    ids[::4, -1] = CONFIG.begin
    return np.where(mask, ids, 1), mask


@pytest.mark.parametrize(
    ("mode", "grammar"),
    [(mode, Grammar(CONFIG, WORDS, pictures=True)) for mode in MODES] + [("sampling", None)],
    ids=[*MODES, "without a grammar"],
)
def test_the_cache_changes_nothing(mode, grammar):
    ids, mask = prompts(4)
    cached, uncached = (
        Generator(model)(ids, mask, MODES[mode], grammar=grammar, seed=3)
        for model in (random_model(), Uncached(random_model()))
    )
    np.testing.assert_array_equal(cached.ids, uncached.ids)
    assert len({tuple(row) for row in cached.ids}) > 1


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_what_is_streamed_is_what_comes_out(mode):
    ids, mask = prompts(3)
    generator = Generator(random_model())
    whole = generator(ids, mask, MODES[mode]).rows()
    pieces = [
        [row[row != NOTHING].tolist() for row in piece]
        for piece in generator.stream(ids, mask, MODES[mode])
    ]
    assert pieces[-1] == whole
    assert len(pieces) > 2
    for earlier, later in itertools.pairwise(pieces):
        for before, after in zip(earlier, later, strict=True):
            assert after[: len(before)] == before


def test_a_row_does_not_depend_on_the_rows_beside_it():
    ids, mask = prompts(4)
    generator = Generator(random_model())
    together = generator(ids, mask, MODES["sampling"], seed=5).ids
    first = generator(ids[:2], mask[:2], MODES["sampling"], seed=5).ids
    np.testing.assert_array_equal(first, together[:2])
    assert (generator(ids, mask, MODES["sampling"], seed=6).ids != together).any()


def follows_the_rules(row: list[int], in_picture: bool, pictures: bool) -> bool:
    """A reading of one row, token by token, that shares nothing with `Grammar`."""
    left = CONFIG.picture_codes if in_picture else None
    for token in row:
        is_code = CONFIG.opt.vocab_size <= token < CONFIG.begin
        if left is None:
            if token == CONFIG.begin and pictures:
                left = CONFIG.picture_codes
            elif not 0 <= token < WORDS:
                return False
        elif left and is_code:
            left -= 1
        elif not left and token == CONFIG.end:
            left = None
        else:
            return False
    return left is None


@pytest.mark.parametrize("pictures", [True, False])
def test_a_thousand_drawings_are_well_formed(pictures):
    # Half of the prompts ask for a picture at once; one may begin as long as it can end.
    ids, mask = prompts(1000)
    decoding = Decoding(max_new=16, temperature=2.0, stop=(STOP,))
    written = Generator(random_model())(
        ids, mask, decoding, grammar=Grammar(CONFIG, WORDS, pictures), seed=1
    ).rows()
    asked = ids[:, -1] == CONFIG.begin
    for row, begun in zip(written, asked, strict=True):
        assert follows_the_rules(row, begun, pictures), row
    begun_by_itself = sum(CONFIG.begin in row for row in written)
    assert (begun_by_itself > 100) if pictures else (begun_by_itself == 0)
    assert sum(CONFIG.end in row for row in written) >= asked.sum() > 200


def test_drawing_stops_at_the_end_of_the_picture():
    ids, mask = prompts(8)
    ids[:, -1] = CONFIG.begin
    decoding = Decoding(max_new=CONFIG.picture_codes + 1, temperature=1.0, stop=(CONFIG.end,))
    for beams in (1, 3):
        written = Generator(random_model())(
            ids,
            mask,
            dataclasses.replace(decoding, beams=beams),
            grammar=Grammar(CONFIG, WORDS, pictures=False),
        ).rows()
        for row in written:
            assert len(row) == CONFIG.picture_codes + 1
            assert follows_the_rules(row, True, False)


def test_top_k_and_top_p_leave_the_likeliest():
    probs = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    scores = jnp.log(jnp.asarray(np.tile(probs, (4000, 1)), jnp.float32))
    keys = jax.random.split(jax.random.key(0), len(scores))

    def shares(**settings):
        tokens = generation.sample(scores, keys, Decoding(temperature=1.0, **settings))
        return np.bincount(np.asarray(tokens), minlength=5) / len(scores)

    np.testing.assert_allclose(shares(), probs, atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [2 / 3, 1 / 3, 0, 0, 0], atol=0.03)
    # 0.5 + 0.25 falls short of 0.8, so the third is in.
    np.testing.assert_allclose(shares(top_p=0.8), [4 / 7, 2 / 7, 1 / 7, 0, 0], atol=0.03)
    for least in (0.4, 0.0):
        np.testing.assert_allclose(shares(top_p=least), [1, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def golden_opt(golden):
    """The tiny OPT of the golden data, here and in transformers."""
    torch = pytest.importorskip("torch")
    from transformers import OPTConfig as TorchConfig
    from transformers import OPTForCausalLM

    folder = golden / "opt_lora" / "base"
    weights = read(folder / "model.safetensors")
    original = OPTForCausalLM(TorchConfig.from_pretrained(folder)).eval()
    original.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False)

    def build() -> OPT:
        config = opt_weights.read_config(folder)
        abstract = nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0)))
        return load(weights, opt_weights.opt(config), abstract)

    io = read(golden / "opt_lora" / "io.safetensors")
    return build, original, io["in/gen_input_ids"], io["in/gen_attention_mask"]


@pytest.mark.parametrize(
    "settings",
    [
        {"beams": 5},
        {"beams": 3, "length_penalty": 2.0},
        {"beams": 3, "length_penalty": 0.0},
        {"beams": 4, "repetition_penalty": 1.3, "min_new": 5},
        {"repetition_penalty": 1.3, "min_new": 5},
    ],
    ids=str,
)
def test_decoding_is_transformers(golden_opt, settings):
    import torch

    build, original, ids, mask = golden_opt
    # Ids that greedy decoding meets often, so that rows do end before the longest.
    greedy = Generator(build())(ids, mask, Decoding(max_new=14)).ids
    stop = tuple(int(i) for i in np.argsort(-np.bincount(greedy.ravel()))[:3])
    decoding = Decoding(max_new=14, stop=stop, **settings)
    written = Generator(build())(ids, mask, decoding).ids
    expected = original.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=14,
        min_new_tokens=decoding.min_new,
        num_beams=decoding.beams,
        length_penalty=decoding.length_penalty,
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=list(stop),
        pad_token_id=1,
    ).numpy()[:, ids.shape[1] :]
    padded = np.full_like(written, 1)
    padded[:, : expected.shape[1]] = expected
    np.testing.assert_array_equal(np.where(written == NOTHING, 1, written), padded)
    assert (written == NOTHING).any()
