"""Batches for training and evaluation, from small files made here."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from transformers import PreTrainedTokenizerFast

from seed_jax.cli import UserError
from seed_jax.data import pipeline, text
from seed_jax.data.limit import Limit
from seed_jax.data.sources import open_source, write_array_record
from tests.pictures import picture, records, word_tokenizer, write_folder, write_records


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def texts(tokenizer) -> dict[str, text.TextField]:
    return {"text": text.TextField(tokenizer, 8), "prompt": text.TextField(tokenizer, 5)}


def config(**changes) -> ConfigDict:
    values = {
        "cache": False,
        "workers": 0,
        "max_tags": 2,
        "drop_caption": 0.0,
        "crop_scale": (0.5, 1.0),
        "flip": True,
        "max_unreadable": 0.01,
    }
    return ConfigDict(values | changes)


def train(source, texts=None, *, batch_size=8, seed=0, rows=None, put=None, **changes):
    return pipeline.train_pipeline(
        source,
        batch_size=batch_size,
        image_size=8,
        texts=texts or {},
        data=config(**changes),
        seed=seed,
        rows=rows,
        put=put,
    )


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# Training batches


def test_batches_hold_what_the_source_holds(tmp_path, texts, tokenizer):
    source = open_source(write_records(tmp_path / "x.array_record", 40))
    for batch in take(train(source, texts, crop_scale=(1.0, 1.0), max_tags=0), 10):
        specs = {name: (value.dtype, value.shape) for name, value in batch.items()}
        assert specs == {
            "image": (np.uint8, (8, 8, 8, 3)),
            "index": (np.int32, (8,)),
            "text": (np.int32, (8, 8)),
            "text_mask": (bool, (8, 8)),
            "prompt": (np.int32, (8, 5)),
            "prompt_mask": (bool, (8, 5)),
        }
        for image, index, ids, mask, prompt in zip(
            *(batch[name] for name in ("image", "index", "text", "text_mask", "prompt")),
            strict=True,
        ):
            colour = np.array(Image.open(io.BytesIO(source[index]["image"]))).mean((0, 1))
            np.testing.assert_allclose(image.mean((0, 1)), colour, atol=4)
            possible = [tokenizer(caption)["input_ids"] for caption in source[index]["captions"]]
            assert ids[mask].tolist() in possible
            np.testing.assert_array_equal(prompt, [*ids[:4], 3])


def test_each_epoch_takes_every_picture_once_in_another_order(tmp_path):
    source = open_source(write_records(tmp_path / "x.array_record", 40))
    batches = train(source)
    epochs = [np.concatenate([batch["index"] for batch in take(batches, 5)]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
    orders = {tuple(epoch) for epoch in [*epochs, np.arange(40)]}
    assert len(orders) == 4


def test_a_picture_is_seen_anew_in_each_epoch(tmp_path):
    source = open_source(write_records(tmp_path / "x.array_record", 8))
    views = {batch["image"][batch["index"] == 3].tobytes() for batch in take(train(source), 5)}
    assert len(views) == 5


def test_the_seed_decides(tmp_path, texts):
    source = open_source(write_records(tmp_path / "x.array_record", 40))
    first = take(train(source, texts, seed=1), 4)
    assert_same(first, take(train(source, texts, seed=1), 4))
    assert not np.array_equal(first[0]["index"], next(train(source, texts, seed=2))["index"])


@pytest.mark.parametrize("cache", [False, True])
def test_resumes_bitwise_from_json(tmp_path, texts, cache):
    source = open_source(write_records(tmp_path / "x.array_record", 101, unreadable=(5,)))
    batches = train(source, texts, cache=cache)
    take(batches, 15)
    state = json.loads(json.dumps(batches.get_state()))
    listed = batches.unreadable
    expected = take(batches, 15)

    fresh = train(source, texts, cache=cache)
    next(fresh)
    for resumed in (fresh, batches):
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert resumed.unreadable == listed == ["picture-5 (not a picture)"]
        assert_same(take(resumed, 15), expected)


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_batch_is_the_same_for_any_number_of_hosts(tmp_path, texts, hosts):
    source = open_source(write_records(tmp_path / "x.array_record", 202, unreadable=(5,)))
    whole = train(source, texts)
    share = 8 // hosts
    parts = [train(source, texts, rows=range(i * share, (i + 1) * share)) for i in range(hosts)]
    for batch in take(whole, 30):
        rows = [next(part) for part in parts]
        joined = {name: np.concatenate([row[name] for row in rows]) for name in batch}
        assert_same([joined], [batch])
    assert whole.unreadable == sorted({name for part in parts for name in part.unreadable})


def test_a_source_smaller_than_a_batch(tmp_path):
    source = open_source(write_records(tmp_path / "x.array_record", 7))
    with pytest.raises(UserError, match=r"x\.array_record has 7 pictures, fewer than the 8"):
        train(source)


class CountingSource:
    def __init__(self, count: int):
        self.path = "counting"
        self.reads = [0] * count
        self._records = records(count)

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self._records[index]

    def name(self, index):
        return f"number {index}"


def test_the_cache_reads_each_picture_once_and_changes_nothing(texts, monkeypatch):
    # Two threads that meet at a new picture may both read it.
    monkeypatch.setattr("seed_jax.data.batches.MAX_THREADS", 1)
    source = CountingSource(16)
    batches = train(source, texts, cache=True)
    start = batches.get_state()
    take(batches, 3)
    batches.set_state(start)
    again = take(batches, 10)
    assert source.reads == [1] * 16
    assert_same(again, take(train(CountingSource(16), texts), 10))


# On the way to devices


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_put_ahead_and_count_once_they_are_given(tmp_path, texts, workers):
    source = open_source(write_records(tmp_path / "x.array_record", 101, unreadable=(5,)))
    expected = take(train(source, texts), 20)
    numbers = []

    def put(batch):
        numbers.append(len(numbers))
        return {name: jnp.asarray(value) for name, value in batch.items()}

    batches = train(source, texts, put=put, workers=workers)
    given = take(batches, 9)
    assert all(isinstance(array, jax.Array) for array in given[0].values())
    assert_same(given, expected[:9])
    deadline = time.monotonic() + 300
    while len(numbers) < 11 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(numbers) == 11  # one waits, and one waits for its place
    state = json.loads(json.dumps(batches.get_state()))
    assert state["batch"] == 9
    assert_same(take(batches, 2), expected[9:11])
    batches.set_state(state)
    assert_same(take(batches, 11), expected[9:])
    batches.close()
    assert not [thread for thread in threading.enumerate() if "prefetch-Thread" in thread.name]


def test_a_users_mistake_comes_through_from_the_thread_that_puts(tmp_path, texts):
    rows = records(16)
    rows[7]["captions"] = []
    write_array_record(tmp_path / "x.array_record", rows)
    batches = train(open_source(tmp_path), texts, put=lambda batch: batch)
    with pytest.raises(UserError, match="picture-7 has no caption"):
        take(batches, 2)
    batches.close()


# Unreadable pictures


def test_an_unreadable_picture_gives_its_row_to_another(tmp_path):
    good = open_source(write_folder(tmp_path, 120))
    expected = take(train(good, batch_size=40), 6)
    (tmp_path / "004.png").write_text("not a picture")
    bad = [good.name(index) for index in range(120)].index("004.png")

    batches = train(open_source(tmp_path), batch_size=40)
    for batch, wanted in zip(take(batches, 6), expected, strict=True):
        same = wanted["index"] != bad
        assert_same(
            [{name: value[same] for name, value in batch.items()}],
            [{name: value[same] for name, value in wanted.items()}],
        )
        assert bad not in batch["index"]
    assert batches.unreadable == ["004.png (not a picture)"]


def test_a_picture_cut_short_and_one_deleted_are_listed_with_the_reason(tmp_path):
    write_folder(tmp_path, 120)
    source = open_source(tmp_path)
    (tmp_path / "004.png").write_bytes(picture(4)[:200])
    (tmp_path / "010.png").unlink()
    batches = train(source, max_unreadable=0.02)
    take(batches, 15)
    cut, gone = sorted(batches.unreadable)
    assert cut.startswith("004.png (")
    assert gone.startswith("010.png ([Errno 2] No such file")


def test_a_damaged_record_is_named_by_file_and_number(tmp_path):
    path = write_records(tmp_path / "x.array_record", 200)
    data = bytearray(path.read_bytes())
    place = data.index(records(200)[117]["image"])
    data[place + 100] ^= 0xFF
    path.write_bytes(data)
    batches = train(open_source(path))
    take(batches, 25)
    (named,) = batches.unreadable
    assert named.startswith(f"{path}, record 117 (")


@pytest.mark.parametrize("unreadable", [(0, 1, 2, 3, 4), tuple(range(200))])
def test_too_many_unreadable_pictures_stop_the_run(tmp_path, unreadable):
    source = open_source(write_records(tmp_path / "x.array_record", 200, unreadable=unreadable))
    with pytest.raises(UserError, match=r"x\.array_record: 3 of 200 pictures can't be read") as e:
        take(train(source), 25)
    for number in ("picture-", "(not a picture)", "max_unreadable is 0.01"):
        assert number in str(e.value)
    with pytest.raises(UserError, match="of 200 pictures can't be read"):
        list(pipeline.eval_batches(source, batch_size=8, image_size=8))


def test_no_readable_picture_at_all_stops_whatever_is_allowed(tmp_path):
    source = open_source(write_records(tmp_path / "x.array_record", 20, unreadable=range(20)))
    with pytest.raises(UserError, match=r"20 of 20 pictures can't be read.* and 17 more"):
        take(train(source, max_unreadable=1.0), 1)
    with pytest.raises(UserError, match="20 of 20 pictures can't be read"):
        list(pipeline.eval_batches(source, batch_size=8, image_size=8, max_unreadable=1.0))
    batches = pipeline.eval_batches(source, batch_size=8, image_size=8, max_unreadable=None)
    assert not any(batch["valid"].any() for batch in batches)
    assert len(batches.unreadable) == 20


def test_a_host_judges_by_its_own_part(tmp_path):
    # In an epoch each of 4 hosts meets a quarter of 400 pictures: 1 % of them and 3 by chance.
    limit = Limit(CountingSource(400), 0.01, rows=2, hosts=4)
    four, five = (dict.fromkeys(range(count), "x") for count in (4, 5))
    limit.check(four, batches_read=1)
    with pytest.raises(UserError, match="5 of 400"):
        limit.check(five, batches_read=1)
    limit.check(five, batches_read=100)


def test_worker_processes_give_the_same_batches_and_count(tmp_path, texts):
    source = open_source(write_records(tmp_path / "x.array_record", 101, unreadable=(5,)))
    threads = train(source, texts)
    expected = take(threads, 20)

    workers = train(source, texts, workers=2)
    assert_same(take(workers, 13), expected[:13])
    state = workers.get_state()
    assert state["unreadable"] == [[5, "picture-5 (not a picture)"]]
    workers.close()
    resumed = train(source, texts, workers=1)
    resumed.set_state(state)
    assert_same(take(resumed, 7), expected[13:])
    resumed.close()


def test_a_users_mistake_comes_through_from_a_worker(tmp_path, texts):
    rows = records(16)
    rows[7]["captions"] = []
    write_array_record(tmp_path / "x.array_record", rows)
    batches = train(open_source(tmp_path), texts, workers=1)
    with pytest.raises(UserError, match="picture-7 has no caption"):
        take(batches, 2)
    batches.close()


START_WORKER = """
import json, sys, time
from ml_collections import ConfigDict
from seed_jax.data import pipeline, sources

if __name__ == "__main__":
    batches = pipeline.train_pipeline(
        sources.open_source(sys.argv[1]), batch_size=8, image_size=8, texts={}, seed=0,
        data=ConfigDict(json.loads(sys.argv[2])),
    )
    next(batches)
    print("reading", flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_killed_run(tmp_path):
    data = write_records(tmp_path / "x.array_record", 16)
    script = tmp_path / "run.py"
    script.write_text(START_WORKER)
    run = subprocess.Popen(
        [sys.executable, script, data, config(workers=1).to_json()],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        start_new_session=True,
    )
    try:
        assert run.stdout.readline() == "reading\n"
        run.kill()
        # The pipe ends when the last process that could write to it, a worker too, is gone.
        run.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise


# Evaluation batches


def test_evaluation_takes_every_picture_once_in_order(tmp_path, texts, tokenizer):
    source = open_source(write_folder(tmp_path, 11))
    batches = list(pipeline.eval_batches(source, batch_size=4, image_size=8, texts=texts))
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert joined["index"].tolist() == [*range(11), -1]
    assert joined["valid"].tolist() == [True] * 11 + [False]
    for row in range(11):
        image = Image.open(io.BytesIO(source[row]["image"]))
        expected = image.resize((8, 8), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(joined["image"][row], expected)
        ids = tokenizer(source[row]["captions"][0])["input_ids"]
        assert joined["text"][row][joined["text_mask"][row]].tolist() == ids
    assert not joined["image"][11].any()


def test_evaluation_marks_an_unreadable_picture_and_needs_no_captions(tmp_path):
    for number in range(101):
        (tmp_path / f"{number:03}.png").write_bytes(picture(number))
    (tmp_path / "000.png").write_text("not a picture")
    batches = pipeline.eval_batches(
        open_source(tmp_path, captions=False), batch_size=16, image_size=8
    )
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.tolist() == [False] + [True] * 100 + [False] * 11
    assert batches.unreadable == ["000.png (not a picture)"]
