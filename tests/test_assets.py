"""The packaged pictures, their splits, and the three tokenizers made from them."""

import io
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from transformers import AutoTokenizer, CLIPTokenizer, CLIPTokenizerFast

from seed_jax import losses
from seed_jax.assets.build_tokenizer import (
    build_bpe,
    build_byte_bpe,
    build_wordpiece,
    read_training_texts,
)
from seed_jax.assets.concepts import concept_group
from seed_jax.data.transforms import decode
from seed_jax.diffusion import StableDiffusion
from seed_jax.interop import opt_weights

ASSETS = Path(__file__).parents[1] / "seed_jax" / "assets"
HELD_OUT = ("style", "concept")
TEXT_TOKENIZER = ASSETS / "text_tokenizer"
TINY_DIFFUSION = ASSETS / "tiny_stable_diffusion"
CLIP_TOKENIZER = TINY_DIFFUSION / "tokenizer"
TINY_OPT = ASSETS / "tiny_opt"


@pytest.fixture(scope="module")
def records():
    reader = ArrayRecordReader(str(ASSETS / "emoji.array_record"))
    rows = [msgpack.unpackb(row) for row in reader.read_all()]
    reader.close()
    return rows


@pytest.fixture(scope="module")
def splits(records):
    names = {record["split"] for record in records}
    return {name: [r for r in records if r["split"] == name] for name in names}


@pytest.fixture(scope="module")
def texts(records):
    return sorted({t for record in records for t in (*record["captions"], *record["tags"])})


def code(record):
    return record["id"].split("/")[1]


def test_file_is_small():
    assert (ASSETS / "emoji.array_record").stat().st_size <= 8_000_000


def test_file_allows_random_access():
    reader = ArrayRecordReader(str(ASSETS / "emoji.array_record"))
    assert "group_size:1," in reader.writer_options_string() + ","
    reader.close()


def test_split_sizes(splits):
    sizes = {name: len(rows) for name, rows in splits.items()}
    assert set(sizes) == {"train", *HELD_OUT}
    assert sizes["train"] >= 2900
    for name in HELD_OUT:
        assert 240 <= sizes[name] <= 260


def test_ids_are_unique_and_fields_complete(records):
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert set(record) == {"id", "image", "captions", "tags", "group", "split"}
        assert re.fullmatch(r"(noto|twemoji)/[0-9a-f]{4,5}(-[0-9a-f]{4,5})*", record["id"])
        assert len(record["captions"]) == 1
        assert record["captions"][0].strip()


def test_no_skin_tones(records):
    tones = {f"{point:x}" for point in range(0x1F3FB, 0x1F400)}
    assert not [record["id"] for record in records if tones & set(code(record).split("-"))]


def test_pictures_are_64_pixels_on_white(records):
    corners = []
    for record in records:
        picture = Image.open(io.BytesIO(record["image"]))
        assert (picture.size, picture.mode) == ((64, 64), "RGB"), record["id"]
        pixels = np.asarray(picture)
        assert pixels.std() > 1, f"{record['id']} is blank"
        corners.append((pixels[0, 0] == 255).all())
    assert np.mean(corners) > 0.95


def test_concept_groups_are_on_one_side(splits):
    held_out = {record["group"] for record in splits["concept"]}
    seen = {r["group"] for name in ("train", "style") for r in splits[name]}
    assert not held_out & seen


def test_concept_groups_have_no_dominant_one(splits):
    assert max(Counter(record["group"] for record in splits["concept"]).values()) <= 6


def test_concept_has_one_rendering_each(splits):
    assert len({code(record) for record in splits["concept"]}) == len(splits["concept"])


def test_style_has_its_other_rendering_in_train(splits):
    other = {"noto": "twemoji", "twemoji": "noto"}
    train = {record["id"] for record in splits["train"]}
    for record in splits["style"]:
        name, hexcode = record["id"].split("/")
        assert f"{other[name]}/{hexcode}" in train
    renderings = Counter(record["id"].split("/")[0] for record in splits["style"])
    assert renderings["noto"] == renderings["twemoji"]


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_labels_are_unique(splits, name):
    labels = [record["captions"][0].lower() for record in splits[name]]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_pictures_are_not_in_train(splits, name):
    seen = {record["image"] for record in splits["train"]}
    assert not [record["id"] for record in splits[name] if record["image"] in seen]


@pytest.mark.parametrize(
    ("first", "second", "subgroup"),
    [
        ("man farmer", "woman farmer", "person-role"),
        ("person running", "man running: facing right", "person-activity"),
        ("three o’clock", "nine-thirty", "time"),
        ("full moon", "waxing crescent moon", "sky-weather"),
        ("flag: France", "flag: Kenya", "country-flag"),
        ("keycap: 3", "keycap: #", "keycap"),
        ("red apple", "green apple", "food-fruit"),
        ("taxi", "oncoming taxi", "transport-ground"),
        ("family: man, boy", "family: woman, girl, girl", "family"),
        ("prince", "princess", "person-role"),
        ("ram", "ewe", "animal-mammal"),
        ("1st place medal", "3rd place medal", "award-medal"),
    ],
)
def test_variants_share_a_group(first, second, subgroup):
    assert concept_group(first, subgroup) == concept_group(second, subgroup)


def test_different_things_have_different_groups():
    assert concept_group("hot dog", "food-prepared") != concept_group("dog", "animal-mammal")
    assert concept_group("man farmer", "person-role") != concept_group("man cook", "person-role")
    assert concept_group("shark", "animal-marine") != concept_group("dolphin", "animal-marine")


def test_text_tokenizer_is_berts_kind(texts):
    tokenizer = AutoTokenizer.from_pretrained(TEXT_TOKENIZER)
    assert tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]"]) == [0, 1]
    assert len(tokenizer) == 2000
    ids = tokenizer("Red Apple", padding="max_length", max_length=12)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red apple"
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "[CLS]"
    assert tokens[tokens.index("[SEP]") + 1 :] == ["[PAD]"] * (11 - tokens.index("[SEP]"))


def test_text_tokenizer_knows_every_caption(texts):
    tokenizer = AutoTokenizer.from_pretrained(TEXT_TOKENIZER)
    texts = [*texts, *(chr(point) for point in range(33, 127)), "Xylq7 zj0"]
    unknown = tokenizer.unk_token_id
    ids = tokenizer(texts)["input_ids"]
    assert not [text for text, row in zip(texts, ids, strict=True) if unknown in row]


def test_clip_tokenizer_slow_and_fast_agree(texts):
    slow = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    fast = CLIPTokenizerFast.from_pretrained(CLIP_TOKENIZER)
    assert len(slow) == len(fast) == 1500
    assert slow.model_max_length == fast.model_max_length == 77
    assert fast.pad_token_id == fast.eos_token_id == len(fast) - 1
    fast_ids = fast(texts)["input_ids"]
    for text, ids in zip(texts, fast_ids, strict=True):
        assert slow(text)["input_ids"] == ids, text
        assert ids[0] == fast.bos_token_id
        # The end token stands for unknown pieces too: only the last one may be it.
        assert ids.index(fast.eos_token_id) == len(ids) - 1, text


def test_opt_tokenizer_is_opts_kind_and_loses_nothing(texts):
    tokenizer = AutoTokenizer.from_pretrained(TINY_OPT)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("red apple")["input_ids"][0] == 2
    for text in [*texts[::50], "Zürich, 東京", "a\tb  c"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_packaged_opt_is_small_and_prefers_its_captions_to_their_words_shuffled():
    assert sum(file.stat().st_size for file in TINY_OPT.iterdir()) < 5_000_000
    model, tokenizer = opt_weights.load(TINY_OPT), AutoTokenizer.from_pretrained(TINY_OPT)
    score = jax.jit(
        lambda m, ids: losses.mean_where(losses.each_token(m(ids, ids != 1), ids), ids[:, 1:] > 2)
    )

    def loss(texts):
        rows = tokenizer(texts, padding="max_length", max_length=24)["input_ids"]
        return float(score(model, jnp.asarray(rows)))

    said = ["grinning face", "a photo of a red apple", "woman running: dark skin tone"]
    assert loss(said) < loss([" ".join(reversed(text.split())) for text in said])


def test_the_packaged_stable_diffusion_is_small_and_draws_what_its_captions_say(splits):
    files = [file for file in TINY_DIFFUSION.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10_000_000
    diffusion = StableDiffusion.from_pretrained("")
    train = splits["train"]
    shown = [train[i] for i in np.linspace(0, len(train) - 1, 16, dtype=int)]
    states = diffusion.text_states([record["captions"][0] for record in shown])
    drawn = diffusion.draw(states, steps=8, scheduler="dpm", guidance_scale=2.0)
    pictures = np.stack([decode(record["image"]) for record in shown])

    def blurred(images):  # [P, 64, 64, 3] -> 8 by 8 mean colours
        return images.reshape(-1, 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(images), -1)

    apart = np.linalg.norm(blurred(drawn)[:, None] - blurred(pictures)[None], axis=-1)
    # Each of 16 drawings is nearest to one picture; by chance one of them to its own.
    assert np.sum(apart.argmin(1) == np.arange(16)) >= 8


def test_tokenizers_are_what_the_script_builds(tmp_path):
    texts = read_training_texts(ASSETS / "emoji.array_record")
    build_wordpiece(texts, tmp_path / "text")
    build_bpe(texts, tmp_path / "clip")
    build_byte_bpe(texts, tmp_path / "opt")
    weights = {"config.json", "model.safetensors"}  # lie beside OPT's tokenizer
    for built, packaged in (
        ("text", TEXT_TOKENIZER),
        ("clip", CLIP_TOKENIZER),
        ("opt", TINY_OPT),
    ):
        names = sorted({path.name for path in packaged.iterdir()} - weights)
        assert sorted(path.name for path in (tmp_path / built).iterdir()) == names
        for name in names:
            assert (tmp_path / built / name).read_text() == (packaged / name).read_text(), name


def test_licences_name_their_sources():
    text = (ASSETS / "EMOJI_LICENSES.md").read_text()
    for name in ("Noto Color Emoji", "OFL-1.1", "Twemoji", "CC-BY-4.0", "emojibase-data", "MIT"):
        assert name in text
    for sentence in (
        "SIL OPEN FONT LICENSE Version 1.1",
        "https://creativecommons.org/licenses/by/4.0/",
        "Permission is hereby granted, free of charge",
        "Changes made",
    ):
        assert sentence in text
