"""Features in place of pictures: what is written, batches of it, and stage 2 trained from it."""

import json
import shutil
from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from configs import tiny_codebook
from seed_jax import SeedTokenizer, model_dir, tokenize
from seed_jax.cli import UserError
from seed_jax.data import features, transforms
from seed_jax.data.features import FeatureSource
from seed_jax.data.sources import ArrayRecordSource, open_source
from seed_jax.data.text import choose_caption
from seed_jax.models import teacher
from seed_jax.tasks.codebook import Codebook
from seed_jax.train import train
from tests import stages
from tests.pictures import write_folder
from tests.random_weights import random_weights
from tests.test_pipeline import assert_same, take
from tests.test_pipeline import config as data_config
from tests.test_train import check_stored_in, losses, small, train_until_killed
from tests.tiny import write_pictures

PICTURES, VIEWS, SEED, SIDE = 20, 3, 7, 32
# Of a number that is rounded to float16.
ROUNDING = 2.0**-11

# What is written once serves all tests.
pytestmark = pytest.mark.xdist_group("features")


def write(init: str, pictures: Path, folder: Path, *options: str) -> Path:
    named = {"--model": init, "--teacher": "", "--images": pictures, "--output": folder}
    given = [str(part) for option in named.items() for part in option]
    tokenize.main(["--features", *given, "--batch-size", "24", *options])
    return folder


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> str:
    return stages.save_first(tmp_path_factory.mktemp("init"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Every other one has two captions."""
    return write_pictures(tmp_path_factory.mktemp("drawn") / "pictures", PICTURES)


@pytest.fixture(scope="module")
def drawn(init, pictures) -> Path:
    """Views drawn at random, in three shards."""
    options = ["--views", str(VIEWS), "--seed", str(SEED), "--max-tags", "1"]
    return write(init, pictures, pictures.with_name("f"), *options, "--records-per-shard", "8")


def recipe(init: str, **changes) -> ConfigDict:
    config = small(tiny_codebook.get_config(), init=init, **changes).unlock()
    config.model.codebook.size = 64
    config.codebook_health.kmeans_batches = 0
    return config


def picture_rows(pictures: Path, task: Codebook, wanted: list[tuple[int, int]]) -> dict:
    """A batch of pictures that has these views (picture, view), as training would draw them."""
    source = open_source(pictures)
    images, captions = [], []
    for index, view in wanted:
        rng, record = Random(f"{SEED}/{index}/{view}"), source[index]
        image = transforms.decode(record["image"])
        images.append(transforms.random_view(image, SIDE, rng, scale=(0.5, 1.0), flip=True))
        captions.append(choose_caption(record, rng, 1))
    return {
        "image": np.stack(images),
        **task.text_fields()["prompt"].named_batch("prompt", captions),
    }


def test_each_view_is_what_the_frozen_networks_make_of_it(init, pictures, drawn):
    task = Codebook(recipe(init))
    model = nnx.jit(lambda: task.build(rngs=nnx.Rngs(0)))()
    task.prepare(model, iter([]))
    source = FeatureSource(drawn)
    assert len(source) == PICTURES
    views = [(index, view) for index in range(PICTURES) for view in range(VIEWS)]
    batch = picture_rows(pictures, task, views)
    made = jax.device_get(nnx.jit(task._run_frozen)(model, batch))
    for row, (index, view) in enumerate(views):
        found = source.view(index, view)
        # Sums come out a little different in batches of another size.
        np.testing.assert_allclose(found.causal, made["causal"][row], rtol=ROUNDING, atol=1e-5)
        np.testing.assert_allclose(found.states, made["states"][row], rtol=ROUNDING, atol=1e-5)
        assert source.name(index) == open_source(pictures)[index]["id"]
        assert not np.array_equal(found.causal, source.view(index, (view + 1) % VIEWS).causal)

    # A caption is stored once.
    records = ArrayRecordSource(sorted(drawn.glob("*.array_record")))
    assert len(records) == PICTURES * 2 * VIEWS
    captions = batch["prompt"].reshape(PICTURES, VIEWS, -1)
    different = [len(np.unique(rows, axis=0)) for rows in captions]
    assert set(different) > {1}
    stored = ["states" in records[number] for number in range(len(records))]
    assert np.sum(np.reshape(stored, (PICTURES, -1)), axis=1).tolist() == different


def test_views_depend_neither_on_shards_nor_on_batches(init, pictures, drawn, tmp_path):
    options = ["--views", str(VIEWS), "--seed", str(SEED), "--max-tags", "1", "--workers", "1"]
    again = FeatureSource(write(init, pictures, tmp_path / "f", *options, "--batch-size", "60"))
    first = FeatureSource(drawn)
    assert len(list(drawn.glob("*.array_record"))) == 3
    for index in range(PICTURES):
        assert first.name(index) == again.name(index)
        for view in range(VIEWS):
            for a, b in zip(first.view(index, view), again.view(index, view), strict=True):
                np.testing.assert_allclose(a, b, rtol=2 * ROUNDING, atol=1e-5)


def batches(*folders: Path, batch_size: int = 8, rows=None, weights=(), **changes):
    data = data_config(**changes)
    data.update(features=",".join(map(str, folders)), weights=weights)
    return features.train_pipeline(
        features.open_training_set(data), batch_size=batch_size, data=data, seed=0, rows=rows
    )


def test_batches_are_rows_of_the_features_in_the_pictures_order(pictures, drawn):
    source = FeatureSource(drawn)
    order = take(stage_pictures(pictures), 10)
    views = set()
    for number, batch in enumerate(take(batches(drawn), 10)):
        found = {name: (array.shape, array.dtype) for name, array in batch.items()}
        assert found == features.train_shapes(source.settings, 8)
        np.testing.assert_array_equal(batch["index"], order[number]["index"])
        for row, index in enumerate(batch["index"]):
            view = Random(8 * number + row).randrange(VIEWS)
            views.add((int(index), view))
            assert_row(batch, row, source.view(int(index), view))
    assert len(views) > 2 * PICTURES


def assert_row(batch: dict, row: int, view: features.View) -> None:
    np.testing.assert_array_equal(batch["causal"][row], view.causal)
    np.testing.assert_array_equal(batch["states"][row], view.states)


def test_folders_mix_by_their_weights(drawn, whole):
    _, plain = whole  # of two views
    first, second = FeatureSource(drawn), FeatureSource(plain)
    counts = np.zeros(2, int)
    for number, batch in enumerate(take(batches(drawn, plain, weights=(1.0, 3.0)), 10)):
        for row, index in enumerate(batch["index"]):
            rng = Random(8 * number + row)
            of_second = index >= PICTURES
            counts[int(of_second)] += 1
            found = (
                second.view(int(index) - PICTURES, rng.randrange(2))
                if of_second
                else first.view(int(index), rng.randrange(VIEWS))
            )
            assert_row(batch, row, found)
    assert counts.tolist() == [20, 60]


def stage_pictures(pictures: Path):
    from tests.test_pipeline import train as train_pictures

    return train_pictures(open_source(pictures))


def test_they_resume_and_are_the_same_on_two_hosts_and_in_workers(drawn):
    whole = batches(drawn)
    expected = take(whole, 12)
    parts = [batches(drawn, rows=range(host * 4, host * 4 + 4), workers=host) for host in range(2)]
    for batch in expected[:6]:
        rows = [next(part) for part in parts]
        assert_same([{name: np.concatenate([r[name] for r in rows]) for name in batch}], [batch])
    states = [json.loads(json.dumps(part.get_state())) for part in parts]
    for part in parts:
        part.close()
    resumed = batches(drawn)
    resumed.set_state(states[0])
    assert_same(take(resumed, 6), expected[6:])


def test_a_damaged_record_gives_its_row_to_another(drawn, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(drawn, folder)
    file = sorted(folder.glob("*.array_record"))[1]
    data, source = bytearray(file.read_bytes()), FeatureSource(drawn)
    for view in range(VIEWS):
        place = data.index(source.view(11, view).causal.tobytes())
        data[place + 100] ^= 0xFF
    file.write_bytes(data)
    made = batches(folder, max_unreadable=0.05)
    for batch, wanted in zip(take(made, 8), take(batches(drawn), 8), strict=True):
        same = wanted["index"] != 11
        assert 11 not in batch["index"]
        for name in batch:
            np.testing.assert_array_equal(batch[name][same], wanted[name][same])
    (named,) = made.unreadable
    # Its first record in that shard, which the three pictures before it have six each in.
    assert named.startswith(f"{file}, record {3 * 2 * VIEWS} of {folder} (")
    with pytest.raises(UserError, match="1 of 20 pictures can't be read"):
        take(batches(folder), 8)


def test_a_batch_has_the_loss_that_its_pictures_have(init, pictures, drawn):
    config = recipe(init, batch_size=8)
    plain = Codebook(config)
    config = config.copy_and_resolve_references()
    config.data.features = str(drawn)
    task = Codebook(config)
    models = []
    for one in (plain, task):
        models.append(nnx.jit(lambda one=one: one.build(rngs=nnx.Rngs(0)))())
        one.prepare(models[-1], iter([]))
    batch = next(batches(drawn))
    views = [(int(i), Random(row).randrange(VIEWS)) for row, i in enumerate(batch["index"])]
    from_pictures = nnx.jit(plain.outputs)(
        models[0], picture_rows(pictures, plain, views), jax.random.key(0)
    )
    from_features = nnx.jit(task.outputs)(models[1], batch, jax.random.key(0))
    assert from_pictures[0].keys() == from_features[0].keys()
    for name, loss in from_pictures[0].items():
        # Losses are at most quadratic in what is rounded.
        np.testing.assert_allclose(from_features[0][name], loss, rtol=2 * ROUNDING)


@pytest.fixture(scope="module")
def whole(init, tmp_path_factory) -> tuple[Path, Path]:
    """Pictures with one caption each, and features of them as they are."""
    folder = tmp_path_factory.mktemp("whole")
    one_caption = write_folder(folder / "pictures", 24)
    options = ["--views", "2", "--crop-scale", "--no-flip"]
    return one_caption, write(init, one_caption, folder / "features", *options)


def test_stage_2_from_features_is_stage_2_from_pictures(init, whole, tmp_path):
    one_caption, folder = whole
    config = recipe(init, steps=6, checkpoint_every=3)
    config.codebook_health.kmeans_batches = 2
    config.data.update(path=str(one_caption), split="")
    train(config.lock(), tmp_path / "pictures")
    config = config.copy_and_resolve_references().unlock()
    config.data.update(features=str(folder), path="not looked at")
    train_until_killed(config.lock(), tmp_path / "features", at=5)
    train(config, tmp_path / "features")
    np.testing.assert_allclose(
        losses(tmp_path / "features"), losses(tmp_path / "pictures"), rtol=1e-3
    )

    shapes = [
        model_dir.stored_shapes(tmp_path / name / "model") for name in ("pictures", "features")
    ]
    assert shapes[0] == shapes[1]
    made = SeedTokenizer.from_pretrained(tmp_path / "features/model")
    first = model_dir.lazy_params(init, nnx.state(made.encoder, nnx.Param))
    for name, array in model_dir.flat_params(nnx.state(made.encoder, nnx.Param)).items():
        np.testing.assert_array_equal(array, first[name])
    images = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    codes = made.encode(images)
    assert len(np.unique(codes)) > 1
    other = SeedTokenizer.from_pretrained(tmp_path / "pictures/model").encode(images)
    assert np.mean(codes == other) > 0.9


def test_the_model_directory_is_of_the_configs_precision(init, whole, tmp_path):
    config = recipe(init, steps=1, precision="float16")
    config.loss.update(reconstruction=2.0, retrieval=0.0)
    config.data.features = str(whole[1])
    train(config.lock(), tmp_path)
    assert np.isfinite(losses(tmp_path)).all()
    check_stored_in("float16", tmp_path / "model")


def other_teacher(folder: Path) -> Path:
    """The packaged one, with one weight changed."""
    shutil.copytree(teacher.PACKAGED, folder)
    file = folder / "text_encoder/model.safetensors"
    weights = load_file(file)
    weights[min(weights)].flat[0] += 1
    save_file(weights, file)
    return folder


def test_features_that_belong_to_something_else_are_refused(init, whole, tmp_path):
    _, folder = whole

    def refused(match: str, **changes) -> None:
        config = recipe(**{"init": init, **changes})
        with pytest.raises(UserError, match=match) as error:
            train(config.lock(), tmp_path / f"run {len(list(tmp_path.iterdir()))}")
        assert "\n" not in str(error.value)

    chosen = {"data.features": str(folder)}
    refused("set config.remember=False", remember=True, **chosen)
    refused(
        "text states of another text encoder", teacher=str(other_teacher(tmp_path / "t")), **chosen
    )
    refused("no report.json of features there", **{"data.features": str(tmp_path)})
    _, task = stages.make("causal_qformer", tmp_path)
    other = random_weights(lambda: task.build(rngs=nnx.Rngs(0)), deviation=0.1)
    task.save(other, tmp_path / "other")
    refused("features of another stage 1", init=str(tmp_path / "other"), **chosen)

    shutil.copytree(folder, tmp_path / "f")
    report = json.loads((tmp_path / "f/report.json").read_text())
    (tmp_path / "f/report.json").write_text(json.dumps(report | {"states": [7, 12]}))
    refused(
        r"text states \(7, 12\), but .* make \(77, 128\)", **{"data.features": str(tmp_path / "f")}
    )
    (tmp_path / "f/report.json").write_text(json.dumps(report | {"complete": False}))
    refused("seed_jax.tokenize has not finished", **{"data.features": str(tmp_path / "f")})


def test_the_pass_refuses_what_it_can_not_do(init, whole, tmp_path):
    with pytest.raises(UserError, match="needs --teacher"):
        tokenize.main(
            ["--features", "--model", init, "--images", str(whole[0]), "--output", str(tmp_path)]
        )
    with pytest.raises(UserError, match="two numbers"):
        write(init, whole[0], tmp_path / "f", "--crop-scale", "0.5")
    with pytest.raises(UserError, match="made with views 2, now it would be 5"):
        write(init, whole[0], whole[1], "--views", "5", "--crop-scale", "--no-flip")
