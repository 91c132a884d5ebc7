"""Several sets trained on at once, from small files made here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from seed_jax.cli import UserError
from seed_jax.data import mixture
from seed_jax.data.sources import open_source, write_array_record
from seed_jax.tasks.memory import Memory
from tests.pictures import records, write_folder, write_records
from tests.test_pipeline import assert_same, take, train

A, B = 60, 12


@pytest.fixture
def two(tmp_path) -> str:
    """A folder of 60 pictures and ArrayRecord shards of 12, as a config names them."""
    write_folder(tmp_path / "a", A)
    (tmp_path / "b").mkdir()
    write_records(tmp_path / "b/0.array_record", B)
    return f"{tmp_path / 'a'},{tmp_path / 'b'}"


def opened(path: str, weights: tuple = (), split: str = ""):
    return mixture.open_training_set(ConfigDict({"path": path, "split": split, "weights": weights}))


def indices(batches, count: int) -> np.ndarray:
    return np.concatenate([batch["index"] for batch in take(batches, count)])


def assert_permutations(index_N: np.ndarray, values: range) -> None:
    assert len(index_N) >= 2 * len(values)
    epochs = [index_N[i : i + len(values)] for i in range(0, len(index_N), len(values))]
    whole = [tuple(epoch) for epoch in epochs if len(epoch) == len(values)]
    assert all(sorted(epoch) == list(values) for epoch in whole)
    assert len({*whole, tuple(values)}) == len(whole) + 1


def test_records_are_those_of_the_sets_one_after_the_other(two):
    source = opened(two)
    sets = [open_source(path) for path in two.split(",")]
    assert len(source) == A + B
    for index, (number, place) in (
        (0, (0, 0)),
        (A - 1, (0, A - 1)),
        (A, (1, 0)),
        (-1 + A + B, (1, B - 1)),
    ):
        assert source[index] == sets[number][place] | {"set": number}
        assert source.name(index) == f"{sets[number].name(place)} of {sets[number].path}"


def test_weights_say_how_many_rows_come_from_each_set(two):
    index_N = indices(train(opened(two, (2.0, 1.0)), batch_size=6), 40)
    from_b = index_N >= A
    assert from_b.reshape(40, 6).sum(1).tolist() == [2] * 40
    # The small set goes through its pictures more often, each time in another order.
    assert_permutations(index_N[~from_b], range(A))
    assert_permutations(index_N[from_b], range(A, A + B))


@pytest.mark.parametrize(("weights", "share"), [((0.7, 0.3), 0.3), ((1, 9), 0.9), ((99, 1), 0.01)])
def test_other_weights_are_met_within_a_hundredth(two, weights, share):
    order = mixture.training_order(opened(two, weights), seed=3)
    found = np.mean([order[position] >= A for position in range(2000)])
    assert found == pytest.approx(share, rel=0.01)


def test_without_weights_every_record_comes_once_an_epoch(two):
    assert_permutations(indices(train(opened(two), batch_size=6), 36), range(A + B))


def test_sets_of_one_size_are_not_in_step(tmp_path):
    for name in ("a", "b"):
        write_records(tmp_path / f"{name}.array_record", 30)
    path = f"{tmp_path / 'a.array_record'},{tmp_path / 'b.array_record'}"
    order = mixture.training_order(opened(path, (1.0, 1.0)), seed=0)
    index_N = np.array([order[position] for position in range(60)])
    assert (index_N[index_N < 30] != index_N[index_N >= 30] - 30).sum() > 20


def test_the_split_applies_to_each_set(two, tmp_path):
    write_records(tmp_path / "c.array_record", 16)
    source = opened(f"{tmp_path / 'b'},{tmp_path / 'c.array_record'}", split="test")
    assert len(source) == B // 4 + 4
    assert {source[index]["split"] for index in range(len(source))} == {"test"}
    with pytest.raises(UserError, match="a: no pictures in split 'test'"):
        opened(two, split="test")


@pytest.mark.parametrize("weights", [(), (1.0, 2.0)])
def test_resumes_bitwise_in_the_middle_of_a_mixture_on_any_hosts(two, tmp_path, weights):
    source = opened(two, weights)
    (tmp_path / "a/004.png").write_text("not a picture")
    batches = train(source, max_unreadable=0.1)
    take(batches, 13)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 20)
    assert batches.unreadable == [f"004.png of {tmp_path / 'a'} (not a picture)"]

    for changes in ({}, {"workers": 2}):
        resumed = train(source, max_unreadable=0.1, **changes)
        resumed.set_state(state)
        assert_same(take(resumed, 20), expected)
        resumed.close()
    hosts = [train(source, max_unreadable=0.1, rows=rows) for rows in (range(4), range(4, 8))]
    for host in hosts:
        host.set_state(state)
    for batch in expected:
        first, second = (next(host) for host in hosts)
        joined = {name: np.concatenate([first[name], second[name]]) for name in batch}
        assert_same([joined], [batch])


def test_the_row_of_an_unreadable_picture_goes_to_one_of_its_set(two, tmp_path):
    rows = records(B)
    for row in rows[:4]:
        row["image"] = b"this is text"
    write_array_record(tmp_path / "b/0.array_record", rows)
    batches = train(opened(two, (2.0, 1.0)), batch_size=6, max_unreadable=0.5)
    index_N = indices(batches, 20)
    assert (index_N >= A).reshape(20, 6).sum(1).tolist() == [2] * 20
    assert not np.isin(index_N, range(A, A + 4)).any()
    assert len(batches.unreadable) == 4


def test_a_set_that_cannot_be_read_stops_the_run_however_small(two, tmp_path):
    write_records(tmp_path / "b/0.array_record", 2, unreadable=(0, 1))
    # Two are fewer than a twentieth of all.
    with pytest.raises(UserError, match=r"b: 1 of 2 pictures can't be read .*picture-\d of .*b "):
        take(train(opened(two), max_unreadable=0.05), 20)


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (1.0, 30.0), (7.0, 2.0)])
def test_a_pass_sees_every_record(two, weights):
    source = opened(two, weights)
    rows = mixture.rows_of_a_pass(source)
    order = mixture.training_order(source, seed=1)
    seen = [order[position] for position in range(rows)]
    assert set(seen) == set(range(A + B))
    # And is hardly longer than it has to be.
    assert set(seen[: int(0.95 * rows)]) < set(range(A + B))


def test_memory_is_filled_from_a_mixture(two):
    data = ConfigDict({"path": two, "split": "", "weights": (1.0, 4.0)})
    memory = Memory(data, {"own": jax.ShapeDtypeStruct((1,), jnp.float32)})
    batches = train(mixture.open_training_set(data))
    memory.fill(
        nnx.Dict(),
        lambda _, batch: {"own": batch["index"][:, None] + 0.5},
        ({name: jnp.asarray(value) for name, value in batch.items()} for batch in batches),
        batch_size=8,
    )
    found = memory.lookup(jnp.arange(A + B))["own"][:, 0]
    np.testing.assert_array_equal(found, np.arange(A + B) + 0.5)


def test_a_comma_in_a_name(tmp_path):
    folder = write_folder(tmp_path / "cats, dogs", 9)
    source = opened(str(folder))
    assert (len(source), source.path) == (9, str(folder))


@pytest.mark.parametrize(
    ("path", "weights", "message"),
    [
        ("{two}", (1.0,), "weights has 1 numbers for 2 sets"),
        ("{two}", (1.0, 2.0, 3.0), "weights has 3 numbers"),
        ("embedded", (1.0, 2.0), r"weights has 2 numbers for 1 sets .*\(.*emoji"),
        ("{two}", (1.0, 0.0), "must be a number above 0"),
        ("{two}", (-1.0, 1.0), "must be a number above 0"),
        ("{two}", ("a", "b"), "must be a number above 0"),
        ("{two}", (1.0, float("inf")), "must be a number above 0"),
        ("{two}", (1.0, float("nan")), "must be a number above 0"),
        ("{two},gone", (), "'gone': no such file or folder"),
        ("{two},", (), "'': no such file or folder"),
    ],
)
def test_mistakes_cost_one_line(two, path, weights, message):
    with pytest.raises(UserError, match=message) as error:
        opened(path.format(two=two), weights)
    assert "\n" not in str(error.value)
