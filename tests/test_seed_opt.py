"""SEED-OPT: its training stage, the model that it makes, and the command line around it."""

import json
import shutil
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from configs import tiny_opt, tiny_seed_opt
from seed_jax import SeedOPT, losses, model_dir, tokenize
from seed_jax.cli import UserError
from seed_jax.data.codes import CodesTable
from seed_jax.data.sequences import PackedPairs, PackedTexts, Words, pack
from seed_jax.data.text import DrawnCaption, load_tokenizer
from seed_jax.generate import main
from seed_jax.models.generation import Decoding
from seed_jax.models.opt import OPT, OPTConfig
from seed_jax.models.visual_opt import VisualOPT, VisualOPTConfig
from seed_jax.tasks.language_model import PACKAGED
from seed_jax.tasks.seed_opt import SeedOPTTraining, fill_in
from seed_jax.train import train
from tests.tiny import CODES, QUERIES, SIDE, save_tokenizer, write_pictures

# What one test trains serves the others, in the same worker.
pytestmark = pytest.mark.xdist_group("seed_opt")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("model") / "tokenizer")


@pytest.fixture(scope="module")
def base(pictures, tmp_path_factory) -> Path:
    """An OPT that the recipe of the packaged one trained for two steps."""
    config = tiny_opt.get_config().unlock()
    config.update(steps=2, batch_size=16, unroll=False, checkpoint_every=100)
    config.model.update(width=16, depth=2, heads=2, mlp_dim=24)
    config.sequences.update(row_length=64, per_row=2)
    config.data.update(path=str(pictures), split="", cache=False)
    workdir = tmp_path_factory.mktemp("base")
    train(config.lock(), workdir)
    return workdir / "model"


def recipe(tokenizer: Path, base: Path, pictures: Path, **changes) -> ConfigDict:
    config = tiny_seed_opt.get_config().unlock()
    config.update(steps=3, batch_size=16, image_size=SIDE, log_every=1, checkpoint_every=100)
    config.update(init=str(tokenizer), opt=str(base), unroll=False)
    config.sequences.update(row_length=96, per_row=2, picture_to_text_steps=1)
    config.model.lora.rank = 2
    # Pictures are what `tokenize` sees: whole, not cropped.
    config.data.update(path=str(pictures), split="", cache=False, crop_scale=())
    config.update_from_flattened_dict(changes)
    return config.lock()


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tokenizer, base, pictures, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("seed_opt")
    train(recipe(tokenizer, base, pictures), workdir)
    return workdir


@pytest.fixture(scope="module")
def model(trained) -> SeedOPT:
    return SeedOPT.from_pretrained(trained / "model")


def test_training_learns_captions_first_and_codes_later(trained):
    rows = rows_of(trained)
    assert [row["loss_codes"] > 0 for row in rows] == [False, True, True]
    assert all(np.isfinite(row["loss"]) and row["loss_words"] > 0 for row in rows)
    assert all(row["left_out"] == 0 for row in rows)


def test_known_codes_train_as_those_made_on_the_way(trained, tokenizer, base, pictures, tmp_path):
    codes = tmp_path / "codes.jsonl"
    tokenize.main(["--model", str(tokenizer), "--images", str(pictures), "--output", str(codes)])
    unread = shutil.copytree(pictures, tmp_path / "unread")
    for picture in unread.glob("*.png"):
        picture.write_bytes(b"")
    train(recipe(tokenizer, base, unread, codes=str(codes)), tmp_path / "codes")
    expected, found = ([row["loss"] for row in rows_of(w)] for w in (trained, tmp_path / "codes"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    other = json.loads(codes.read_text().splitlines()[0]) | {"model": "0123456789abcdef"}
    codes.write_text(json.dumps(other) + "\n")
    model_hash = model_dir.describe(tokenizer)["content_hash"]
    with pytest.raises(UserError, match=r"codes\.jsonl:1 has codes of another tokenizer"):
        CodesTable(codes, model_hash, queries=QUERIES, size=CODES)


def test_adapters_and_visual_words_train_alone(tokenizer, base, pictures, trained):
    task = SeedOPTTraining(recipe(tokenizer, base, pictures))
    module = nnx.eval_shape(lambda: task.build(rngs=nnx.Rngs(0)))
    flat = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    training = {name for name in flat if task.trains(tuple(name.split("/")))}
    assert all(name.startswith("model/") for name in training)
    assert {name.split("/")[-1] for name in training if "/opt/" in name} == {"lora_a", "lora_b"}
    assert {"model/outputs", "model/rows", "model/project/kernel"} < training
    # Adapters on all six maps of a layer.
    assert sum(name.endswith("lora_a") for name in training) == 6


def words() -> Words:
    return Words(load_tokenizer(PACKAGED))


VISUAL = VisualOPTConfig(
    opt=OPTConfig(vocab_size=1536, width=16, depth=2, heads=2, mlp_dim=24, max_positions=64),
    codes=CODES,
    code_dim=4,
    picture_codes=QUERIES,
)


def pairs(per_row: int, share: float, row_length: int = 96, codes=()) -> PackedPairs:
    return PackedPairs(
        words(),
        VISUAL,
        row_length=row_length,
        per_row=per_row,
        caption_length=12,
        prompts=["A photo of"],
        picture_to_text_batches=0,
        drawing_share=share,
        codes=codes,
    )


def drawn(captions: list[str]) -> list[DrawnCaption]:
    return [
        DrawnCaption(caption, {"id": str(i), "image": b"", "captions": []}, Random(i))
        for i, caption in enumerate(captions)
    ]


def test_sequences_are_those_of_figure_4():
    codes = jnp.asarray(np.arange(QUERIES)[None])
    for share, shape in ((0.0, "picture first"), (1.0, "picture last")):
        rows = pairs(1, share).training_rows("pair", drawn(["a cat"]), 0)
        ids = np.asarray(fill_in(jnp.asarray(rows["pair_ids"]), codes + VISUAL.opt.vocab_size))[0]
        used = ids[rows["pair_segments"][0] > 0].tolist()
        targets = ids[rows["pair_target"][0]].tolist()
        w = words()
        picture = [VISUAL.begin, *range(1536, 1536 + QUERIES), VISUAL.end]
        if shape == "picture first":
            told = [*w.encode(" a cat"), w.end]
            assert used == [*picture, w.begin, *w.encode("A photo of"), *told]
            assert targets == told
        else:
            asked = [w.begin, *w.encode("Generate an image a cat"), w.end]
            assert used == [*asked, *picture]
            assert targets == picture


def test_pictures_of_one_name_in_two_sets_have_codes_of_their_own(tokenizer, tmp_path):
    content_hash = model_dir.describe(tokenizer)["content_hash"]
    tables = []
    for number in range(2):
        file = tmp_path / f"{number}.jsonl"
        codes = list(range(number, number + QUERIES))
        line = {"image": "1.jpg", "codes": codes, "model": content_hash[:16]}
        file.write_text(json.dumps(line) + "\n")
        tables.append(CodesTable(file, content_hash, queries=QUERIES, size=CODES))
    record = {"id": "1.jpg", "image": b"", "captions": []}
    rows = [DrawnCaption("a cat", record | {"set": number}, Random(0)) for number in (1, 0)]
    packed = pairs(1, 0.0, codes=tables).training_rows("pair", rows, 0)
    first = VISUAL.opt.vocab_size
    assert packed["pair_ids"][0, 1 : 1 + QUERIES].tolist() == list(
        range(first + 1, first + 1 + QUERIES)
    )
    assert packed["pair_ids"][1, 1 : 1 + QUERIES].tolist() == list(range(first, first + QUERIES))


def test_the_base_reads_tags_before_the_caption_that_they_are_of():
    record = {"id": "0", "image": b"", "captions": ["a cat"], "tags": ["pet"]}
    row = DrawnCaption("a cat, pet", record, Random(0))
    w = words()
    for hinted, text in ((1.0, "pet A photo of a cat"), (0.0, "A photo of a cat, pet")):
        field = PackedTexts(w, row_length=20, per_row=1, prompts=["A photo of"], hinted=hinted)
        packed = field.training_rows("text", [row], 0)
        ids = packed["text_ids"][packed["text_segments"] > 0].tolist()
        assert ids == [w.begin, *w.encode(text), w.end]


def test_packed_and_unpacked_rows_have_the_same_loss():
    captions = ["a cat", "one more red dog", "a house", "a tree, green", "boat", "a pink cat"]
    codes = jnp.asarray(np.random.default_rng(0).integers(0, CODES, (len(captions), QUERIES)))
    model = VisualOPT(VISUAL, rngs=nnx.Rngs(0))
    found = []
    for per_row, length in ((3, 96), (1, 40)):
        rows = pairs(per_row, 0.5, length).training_rows("pair", drawn(captions), 0)
        assert rows["pair_left_out"].sum() == 0
        ids = fill_in(jnp.asarray(rows["pair_ids"]), codes + VISUAL.opt.vocab_size)
        logits = jax.jit(lambda m, *inputs: m(*inputs))(model, ids, rows["pair_segments"])
        found.append(
            float(losses.mean_where(losses.each_token(logits, ids), rows["pair_target"][:, 1:]))
        )
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_finds_no_room_is_counted():
    packed = pairs(3, 0.0, 40).training_rows("pair", drawn(["a cat"] * 6), 0)
    assert packed["pair_left_out"].tolist() == [1, 1]
    assert packed["pair_segments"].max() == 2
    assert pack([], 5, padding=1)["ids"].shape == (0, 5)


def test_captions_answers_and_drawings(model, pictures):
    files = sorted(pictures.glob("*.png"))[:3]
    captions = model.caption(files)
    assert len(captions) == 3
    # A picture is a picture, be it a file, pixels or codes.
    pixels = np.asarray(Image.open(files[0]).convert("RGB"))
    short = Decoding(max_new=6, beams=2)
    alone = [model.caption([p], decoding=short) for p in (files[0], pixels, Image.open(files[0]))]
    assert alone[0] == alone[1] == alone[2]
    assert len(model.answer(files[:2], ["What is this?", "Is it a cat?"])) == 2
    codes = model.draw(["a red apple", "a boat"])
    assert codes.shape == (2, QUERIES)
    assert codes.min() >= 0
    assert codes.max() < CODES
    assert model.tokenizer.embed(jnp.asarray(codes)).shape == (2, 7, 12)


def test_pictures_and_text_in_any_order(model, pictures):
    file = sorted(pictures.glob("*.png"))[0]
    codes = model.encode([file])[0]
    decoding = Decoding(max_new=24, temperature=1.5)
    prompts = [["Look:", file, "and", codes, "differ by"], [codes], ["a cat"]]
    for seed in range(4):
        for parts in model.generate(prompts, decoding=decoding, seed=seed):
            for part in parts:
                if not isinstance(part, str):
                    assert part.shape == (QUERIES,)
                    assert 0 <= part.min() <= part.max() < CODES
    text = model.generate([["a cat"]], decoding=decoding, pictures=False)[0]
    assert "".join(model.stream(["a cat"], decoding=decoding)).strip() == "".join(text)


def test_what_was_written_is_text_and_pictures_in_its_order(model):
    config, codes, encode = model.config, np.arange(QUERIES) % CODES, words().encode
    first = config.opt.vocab_size
    drawn = [[config.begin, *(first + row), config.end] for row in (codes, codes[::-1])]
    ids = [*encode(" a cat"), *drawn[0], *drawn[1], *encode(" and a dog"), *drawn[0]]
    expected = ["a cat", codes, codes[::-1], "and a dog", codes]
    for found, part in zip(model._parts(ids), expected, strict=True):
        np.testing.assert_array_equal(found, part)


def test_bad_prompts_cost_one_line(model, pictures, tmp_path):
    file = sorted(pictures.glob("*.png"))[0]
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    for call, message in (
        (lambda: model.caption([tmp_path / "gone.png"]), "no such file"),
        (lambda: model.caption([broken]), "is not a picture"),
        (lambda: model.answer([file], [" "]), "an empty question"),
        (lambda: model.draw([""]), "an empty text"),
        (lambda: model.generate([[]]), "an empty prompt"),
        (lambda: model.generate([[" "]]), "an empty prompt"),
        (lambda: model.generate([["a cat " * 200]]), "is too long: the model reads 128"),
        (lambda: model.draw(["a cat " * 100]), "is too long"),
        (lambda: model.generate([[np.full(QUERIES, CODES)]]), f"{QUERIES} codes below {CODES}"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_another_tokenizer_in_the_directory_is_refused(trained, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    shutil.rmtree(folder / "tokenizer")
    save_tokenizer(folder / "tokenizer", seed=1)
    description = json.loads((folder / "config.json").read_text())
    description["files"] = {
        name: size for name, size in description["files"].items() if "tokenizer/" not in name
    }
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was trained with"):
        SeedOPT.from_pretrained(folder)


def run(capsys, trained: Path, *arguments: str) -> str:
    main(["--model", str(trained / "model"), *arguments])
    return capsys.readouterr().out


def test_the_command_line(trained, pictures, model, capsys):
    file = sorted(pictures.glob("*.png"))[0]
    caption = run(capsys, trained, "--image", str(file))
    assert caption.strip() == model.caption([file])[0]
    found = json.loads(
        run(capsys, trained, "--image", str(file), "--question", "What is this?", "--json")
    )
    assert found["text"] == model.answer([file], ["What is this?"])[0]
    assert found["codes"] == model.encode([file])[0].tolist()
    found = json.loads(run(capsys, trained, "--draw", "a red apple", "--json"))
    assert found["codes"] == model.draw(["a red apple"])[0].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "gone.png"], "no such file"),
        (["--draw", " "], "--draw is empty"),
        (["--image", "gone.png", "--question", ""], "--question is empty"),
    ],
)
def test_mistakes_on_the_command_line(trained, arguments, message):
    with pytest.raises(UserError, match=message):
        main(["--model", str(trained / "model"), *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "Why?"], "give --image too"),
        (["--output", "apple"], "give it a .png at its end"),
        (["--top-p", "0"], "must be above 0 and at most 1"),
    ],
)
def test_options_that_a_drawing_does_not_have(trained, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit):
        main(["--model", str(trained / "model"), "--draw", "a cat", *arguments])
    assert message in capsys.readouterr().err


def test_the_language_model_runs_in_the_precision_that_is_asked_for(trained, monkeypatch):
    asked = []
    load = SeedOPT.from_pretrained

    def noted(path, **options):
        asked.append(load(path, **options))
        return asked[-1]

    monkeypatch.setattr(SeedOPT, "from_pretrained", noted)
    main(["--model", str(trained / "model"), "--draw", "a cat", "--precision", "bfloat16"])
    weights = jax.tree.leaves(asked[0]._generator._state)
    assert jnp.dtype(jnp.bfloat16) in {array.dtype for array in weights}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": ""}, "config.init must name the model directory that stage 2 wrote"),
        ({"image_size": 32}, "takes pictures of 16 pixels"),
        ({"batch_size": 24}, "data shards in groups of 2; 16 can"),
        ({"opt": "nowhere"}, "nowhere/config.json is missing"),
        ({"sequences.row_length": 40}, "row_length is 40 tokens, but a sequence can have"),
        ({"codes": "gone.jsonl"}, "no such file or folder; python -m seed_jax.tokenize writes one"),
        ({"codes": "a.jsonl,b.jsonl"}, "config.codes names 2 files, but config.data.path 1 sets"),
    ],
)
def test_mistakes_in_the_config(tokenizer, base, pictures, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(recipe(tokenizer, base, pictures, **changes), tmp_path / "w")


def test_the_base_is_an_opt_that_transformers_reads(base):
    pytest.importorskip("torch")
    import torch
    from transformers import AutoTokenizer, OPTForCausalLM

    from seed_jax.interop import opt_weights

    theirs = OPTForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(base)("a photo of a cat", return_tensors="np").input_ids
    assert ids[0, 0] == 2
    ours: OPT = opt_weights.load(base)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours(jnp.asarray(ids), jnp.ones_like(ids)), expected, atol=1e-5)
