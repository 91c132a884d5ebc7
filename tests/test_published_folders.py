"""BLIP-2, BERT and EVA's ViT as others publish them: what they compute, and that stage 1 starts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from configs import tiny_causal_qformer
from seed_jax import base_opt, convert, model_dir, sharding
from seed_jax.cli import UserError
from seed_jax.interop import bert_folder, blip2_folder, keys, opt_weights, transformers_folder
from seed_jax.interop.state_dict import key_shapes, matches, to_torch
from seed_jax.models.layers import Compute
from seed_jax.models.opt import OPT, OPTConfig
from seed_jax.models.qformer import QFormer, QFormerConfig
from seed_jax.models.tokenizer import CausalEncoder, EncoderConfig
from seed_jax.models.vit import ViT, ViTConfig
from seed_jax.tasks import causal_qformer
from seed_jax.tasks.causal_qformer import CausalQFormer
from seed_jax.tasks.language_model import PACKAGED
from tests.random_weights import random_weights
from tests.tiny import VOCABULARY, text_tokenizer

# What is converted once serves all tests.
pytestmark = pytest.mark.xdist_group("published_folders")

SIDE, QUERIES, WORDS = 28, 5, len(VOCABULARY)
VISION = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
}
LANGUAGE = {
    "model_type": "opt",
    "vocab_size": 31,
    "hidden_size": 12,
    "word_embed_proj_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 20,
    "max_position_embeddings": 16,
}
MODELS = {
    "model": transformers.Blip2Model,
    "generation": transformers.Blip2ForConditionalGeneration,
    "retrieval": transformers.Blip2ForImageTextRetrieval,
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """The model with none of its weights at a value that hides it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = float("norm" in name.lower() and name.endswith("weight"))
        parameter.data.normal_(mean, 0.3, generator=generator)
    return model.eval()


def blip2_config(kind: str, **language) -> transformers.Blip2Config:
    return transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**TEXT, "use_qformer_text_input": kind == "retrieval"},
        text_config={**LANGUAGE, **language},
        num_query_tokens=QUERIES,
        image_text_hidden_size=6,
    )


@pytest.fixture(scope="module", params=MODELS)
def blip2(request, tmp_path_factory):
    """A model in pieces, and the model directory made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = randomized(MODELS[request.param](blip2_config(request.param)))
    theirs.save_pretrained(folder / "theirs", max_shard_size="20KB")
    assert (folder / "theirs/model.safetensors.index.json").is_file()
    convert.main(
        ["--source", "blip2-hf", "--weights", f"{folder}/theirs", "--output", f"{folder}/ours"]
    )
    return theirs, folder / "ours"


def load_encoder(path, **qformer) -> CausalEncoder:
    config = model_dir.load_config(path, causal_qformer.KIND, EncoderConfig)
    sizes = dataclasses.replace(config.qformer, **qformer)

    def build(config, *, compute, rngs):
        config = dataclasses.replace(config, qformer=sizes)
        return CausalEncoder(config, compute=compute, rngs=rngs)

    return model_dir.load(path, causal_qformer.KIND, EncoderConfig, build, Compute())


def close(ours, theirs: torch.Tensor) -> None:
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_the_encoder_computes_what_transformers_does(blip2):
    theirs, path = blip2
    # BLIP-2's queries all see one another.
    encoder = load_encoder(path, causal=False)
    pixels = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        seen = theirs.vision_model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))[0]
        queries = theirs.query_tokens.expand(2, -1, -1)
        out = theirs.qformer(query_embeds=queries, encoder_hidden_states=seen)[0]
    close(encoder.image_states(jnp.asarray(pixels)), seen)
    close(encoder.causal_embeddings(jnp.asarray(pixels)), out)
    if encoder.text_proj is None:
        return
    assert encoder.vision_proj is not None
    assert encoder.temperature is not None
    assert encoder.temperature[...] == np.float32(0.07)
    ids, mask = np.array([[2, 5, 7, 1], [2, 9, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        words = theirs.embeddings(input_ids=torch.from_numpy(ids))
        states = theirs.qformer(
            query_embeds=words, query_length=0, attention_mask=torch.from_numpy(mask)
        )[0]
        text = torch.nn.functional.normalize(theirs.text_projection(states[:, 0]), dim=-1)
        vision = torch.nn.functional.normalize(theirs.vision_projection(out[:, -1]), dim=-1)
    close(encoder.text_features(jnp.asarray(ids), jnp.asarray(mask, bool)), text)
    close(encoder.image_features(jnp.asarray(out.numpy())), vision)


def test_its_opt_is_a_model_directory_of_its_own(blip2):
    theirs, path = blip2
    if not hasattr(theirs, "language_model"):
        assert not (path / "opt").exists()
        return
    model = base_opt.load(path / "opt", compute=Compute())
    ids = np.array([[2, 5, 7, 1, 30]])
    with torch.no_grad():
        logits = theirs.language_model(torch.from_numpy(ids)).logits
    close(model(ids, np.ones_like(ids)), logits)


def test_what_another_language_model_leaves(tmp_path, capsys):
    config = blip2_config("generation", model_type="t5", d_model=8, d_kv=4, num_layers=1, d_ff=8)
    theirs = randomized(transformers.Blip2ForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path / "theirs")
    arguments = ["--source", "blip2-hf", "--weights", str(tmp_path / "theirs")]
    convert.main([*arguments, "--output", str(tmp_path / "ours")])
    assert not (tmp_path / "ours/opt").exists()
    assert "language_model.shared.weight" in capsys.readouterr().out

    values = json.loads((tmp_path / "theirs/config.json").read_text())
    values["vision_config"]["hidden_act"] = "quick_gelu"
    (tmp_path / "theirs/config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json: hidden_act is 'quick_gelu'; .*'gelu'"):
        convert.main([*arguments, "--output", str(tmp_path / "other")])


@pytest.mark.parametrize("kind", ["generation", "retrieval"])
def test_full_size_names_and_shapes_of_blip2(tmp_path, kind):
    opt = {
        "model_type": "opt",
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    qformer = {"use_qformer_text_input": kind == "retrieval"}
    with torch.device("meta"):
        config = transformers.Blip2Config(text_config=opt, qformer_config=qformer)
        model = MODELS[kind](config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    sizes, text = blip2_folder.read_config(tmp_path, model.state_dict())
    table = blip2_folder.causal_encoder(sizes)
    empty = nnx.eval_shape(lambda: CausalEncoder(sizes, compute=Compute(), rngs=nnx.Rngs(0)))
    ours = key_shapes(table, nnx.state(empty))
    if kind == "retrieval":
        assert ours.pop(blip2_folder.TEMPERATURE) == ()
    ignored = {key for key in shapes if key not in ours}
    assert all(matches(key, table.ignored) for key in ignored)
    assert ours == {key: shape for key, shape in shapes.items() if key not in ignored}
    if kind == "generation":
        language = opt_weights.config_of(text, tmp_path)
        assert language == OPTConfig()
        empty_opt = nnx.eval_shape(lambda: OPT(language, rngs=nnx.Rngs(0)))
        theirs = {
            key.removeprefix("language_model."): shape
            for key, shape in shapes.items()
            if key.startswith("language_model.") and "lm_head" not in key
        }
        assert key_shapes(opt_weights.opt(language), nnx.state(empty_opt)) == theirs


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT with its tokenizer, and the model directory made of it."""
    folder = tmp_path_factory.mktemp("bert")
    theirs = transformers.BertModel(transformers.BertConfig(**TEXT))
    randomized(theirs).save_pretrained(folder / "theirs")
    text_tokenizer().save_pretrained(folder / "theirs")
    convert.main(
        ["--source", "bert", "--weights", f"{folder}/theirs", "--output", f"{folder}/ours"]
    )
    return theirs, folder


def load_bert(path) -> QFormer:
    return model_dir.load(path, causal_qformer.BERT_KIND, QFormerConfig, QFormer, Compute())


def test_bert_reads_what_transformers_reads(bert):
    theirs, folder = bert
    theirs.embeddings.token_type_embeddings.weight.data.zero_()  # BLIP-2 has none
    ids, mask = np.array([[2, 5, 7, 1], [2, 9, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        states = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))[0]
    ours = load_bert(folder / "ours")
    out = ours(text_ids_BT=jnp.asarray(ids), text_mask_BT=jnp.asarray(mask, bool))
    seen = mask[..., None].astype(np.float32)
    close(out * seen, states * torch.from_numpy(seen))


def test_the_queries_path_is_a_copy_of_the_texts(bert):
    ours = load_bert(bert[1] / "ours")
    text, query = (
        model_dir.flat_params(nnx.state(part))
        for part in (ours.layers.text_feed_forward, ours.layers.query_feed_forward)
    )
    assert len(text) == 6
    jax.tree.map(np.testing.assert_array_equal, text, query)


def test_old_names_and_heads_of_bert(bert, tmp_path, capsys):
    _, folder = bert
    weights = {}
    for key, value in safetensors.numpy.load_file(folder / "theirs/model.safetensors").items():
        old = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        weights[f"bert.{old.replace('LayerNorm.bias', 'LayerNorm.beta')}"] = value
    weights["cls.predictions.bias"] = np.zeros(WORDS, np.float32)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    safetensors.numpy.save_file(weights, theirs / "model.safetensors")
    (theirs / "config.json").write_bytes((folder / "theirs/config.json").read_bytes())
    arguments = ["--source", "bert", "--weights", str(theirs), "--output", str(tmp_path / "ours")]
    convert.main(arguments)
    told = capsys.readouterr().out
    assert "embeddings.token_type_embeddings.weight" in told
    assert "cls.predictions.bias" in told
    hashes = {model_dir.describe(p)["content_hash"] for p in (folder / "ours", tmp_path / "ours")}
    assert len(hashes) == 1


def test_full_size_names_and_shapes_of_bert(tmp_path):
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    config = bert_folder.read_config(tmp_path)
    assert config == QFormerConfig(queries=0, vocab_size=30_522)
    table = keys.bert(config)
    empty = nnx.eval_shape(lambda: QFormer(config, compute=Compute(), rngs=nnx.Rngs(0)))
    ours = key_shapes(table, nnx.state(empty))
    left = {key for key in shapes if key not in ours}
    assert left == {
        "embeddings.token_type_embeddings.weight",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    assert ours == {key: shape for key, shape in shapes.items() if key not in left}


VIT = ViTConfig(image_size=SIDE, patch_size=14, width=24, depth=2, heads=3, mlp_dim=20)
SIZES = EncoderConfig(
    vit=VIT,
    qformer=QFormerConfig(
        queries=QUERIES,
        width=16,
        depth=3,
        heads=2,
        mlp_dim=12,
        encoder_width=24,
        vocab_size=WORDS + 2,  # BLIP-2 too has more than BERT
        max_positions=9,
    ),
    contrastive_dim=6,
)


def stage1(*starts, tokenizer, **changes) -> CausalQFormer:
    config = tiny_causal_qformer.get_config().unlock()
    config.init, config.tokenizer, config.train_vit = ",".join(map(str, starts)), tokenizer, False
    config.model = ConfigDict(dataclasses.asdict(SIZES))
    config.update_from_flattened_dict(changes)
    return CausalQFormer(config.lock())


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A file like EVA's with a random ViT, and the model directory made of it."""
    folder = tmp_path_factory.mktemp("vit")
    model = random_weights(lambda: ViT(VIT, compute=Compute(), rngs=nnx.Rngs(0)))
    weights = to_torch(nnx.state(model), keys.eva_vit(VIT))
    weights["head.weight"] = np.zeros((3, 24), np.float32)
    torch.save(
        {k: torch.from_numpy(v.copy()) for k, v in weights.items()}, folder / "eva_vit_g.pth"
    )
    arguments = ["--source", "eva-vit-g", "--weights", str(folder / "eva_vit_g.pth")]
    convert.main([*arguments, "--vit-heads", "3", "--output", str(folder / "ours")])
    return weights, folder / "ours"


def test_eva_and_bert_are_what_stage_1_starts_from(vit, bert, capsys):
    weights, path = vit
    task = stage1(path, bert[1] / "ours", tokenizer=str(bert[1] / "theirs"))
    model = random_weights(lambda: task.build(rngs=nnx.Rngs(0)))
    before = model_dir.flat_params(nnx.state(model))
    task.prepare(model, iter(()))
    after = model_dir.flat_params(nnx.state(model))

    back = to_torch(nnx.state(model.vit), keys.eva_vit(model.vit.config))
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, weights[key], err_msg=key)
    words = bert[0].embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(after["qformer/words"][:WORDS], words)
    np.testing.assert_array_equal(after["qformer/words"][WORDS:], before["qformer/words"][WORDS:])
    fresh = {k for k in before if "cross/" in k or "proj/" in k}
    fresh |= {"qformer/query_tokens", "ln_vision/scale", "ln_vision/bias", "temperature"}
    told = capsys.readouterr().out
    assert set(told.split("hold it: ")[1].strip().split(", ")) == fresh
    for name in fresh - {"qformer/cross/query/kernel"}:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    # Those of chance are made to look at different things.
    scale = tiny_causal_qformer.get_config().first_scale.queries
    name = "qformer/cross/query/kernel"
    np.testing.assert_allclose(after[name], scale * before[name], rtol=1e-6)


def test_blip2_of_transformers_starts_stage_1(blip2, bert, capsys):
    theirs, path = blip2
    task = stage1(bert[1] / "ours", path, tokenizer=str(bert[1] / "theirs"))
    if hasattr(theirs, "embeddings"):
        task.sizes = dataclasses.replace(
            task.sizes, qformer=dataclasses.replace(task.sizes.qformer, vocab_size=WORDS)
        )
    model = random_weights(lambda: task.build(rngs=nnx.Rngs(0)))
    task.prepare(model, iter(()))
    queries = theirs.query_tokens[0].detach().numpy()
    np.testing.assert_array_equal(model.qformer.query_tokens[...], queries)
    # What both hold is of the later one.
    key = theirs.qformer.encoder.layer[0].attention.attention.key.weight.detach().numpy()
    np.testing.assert_array_equal(model.qformer.layers.attention.key.kernel[0].T, key)
    told = capsys.readouterr().out
    if hasattr(theirs, "embeddings"):
        assert not told
    else:
        left = "temperature, text_proj/bias, text_proj/kernel, vision_proj/bias, vision_proj/kernel"
        assert told.endswith(f"hold it: {left}\n")


def test_each_device_gets_its_share(vit, bert):
    task = stage1(vit[1], bert[1] / "ours", tokenizer=str(bert[1] / "theirs"))
    model = random_weights(lambda: task.build(rngs=nnx.Rngs(0)))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.device_put(state, sharding.tree_shardings(state, mesh)))
    task.prepare(model, iter(()))
    assert model.qformer.words is not None
    table = model.qformer.words[...]
    assert table.sharding.spec == PartitionSpec("tensor", "fsdp")
    words = bert[0].embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(table[:WORDS], words)
    tensors = to_torch(nnx.state(model.vit), keys.eva_vit(VIT))
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, vit[0][key], err_msg=key)


def test_a_vit_of_another_resolution(vit, tmp_path):
    _, path = vit
    larger = str(tmp_path / "larger")
    arguments = ["--source", "eva-vit-g", "--weights", str(path.parent / "eva_vit_g.pth")]
    arguments += ["--vit-heads", "3", "--output", larger, "--image-size", str(2 * SIDE)]
    convert.main(arguments)
    loaded = model_dir.load(larger, causal_qformer.VIT_KIND, ViTConfig, ViT, Compute())
    assert loaded(jnp.zeros((1, 2 * SIDE, 2 * SIDE, 3))).shape == (1, 17, 24)


def test_what_stage_1_refuses(vit, bert, tmp_path):
    words = str(bert[1] / "theirs")
    with pytest.raises(UserError, match=r"must name a model directory with a trained ViT"):
        stage1(bert[1] / "ours", tokenizer=words)
    with pytest.raises(UserError, match=r"has 3 heads in its vit, but config\.model\.vit\.heads"):
        stage1(vit[1], tokenizer=words, **{"model.vit.heads": 4})
    with pytest.raises(UserError, match=r"no such directory: .*nowhere"):
        stage1(vit[1], tmp_path / "nowhere", tokenizer=words)
    convert.main(["--source", "opt", "--weights", str(PACKAGED), "--output", str(tmp_path / "opt")])
    with pytest.raises(UserError, match=r"holds a opt model; config\.init takes causal_encoder"):
        stage1(tmp_path / "opt", tokenizer=words)


def test_an_opt_keeps_its_type_and_stage_3_takes_it(tmp_path):
    convert.main(["--source", "opt", "--weights", str(PACKAGED), "--output", str(tmp_path / "opt")])
    stored = model_dir.stored_shapes(tmp_path / "opt")
    kept = model_dir.load(
        tmp_path / "opt", base_opt.KIND, OPTConfig, OPT, Compute(), stored=jnp.float16
    )
    back = to_torch(nnx.state(kept), opt_weights.opt(kept.config))
    published = transformers_folder.read_tensors(PACKAGED)
    assert back.keys() == published.keys()
    assert len(stored) == len(model_dir.flat_params(nnx.state(kept)))
    for key, tensor in published.items():
        assert tensor.dtype == np.float16
        assert back[key].tobytes() == np.asarray(tensor).tobytes(), key
    assert base_opt.read_config(tmp_path / "opt") == base_opt.read_config(PACKAGED)
    theirs, ours = (base_opt.load(p, compute=Compute()) for p in (PACKAGED, tmp_path / "opt"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(theirs), nnx.state(ours))
