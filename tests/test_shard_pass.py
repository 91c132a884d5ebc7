"""A pass by shards: several real processes, kills, and folders that are not what they should be."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seed_jax import hosts
from seed_jax.cli import UserError
from seed_jax.data import prepared
from seed_jax.data.sources import ArrayRecordSource, Part, open_source, write_array_record
from seed_jax.shard_pass import Pass, Shard, Write, Written, run
from tests.pictures import records, write_records

FORMAT = "seed_jax.test 1"
PICTURES = 20


def work(pictures: Path, folder: Path, **changes) -> Pass:
    settings = {
        "folder": folder,
        "format": FORMAT,
        "content": "captions",
        "suffix": ".array_record",
        "source": open_source(pictures),
        "settings": {"model": "abc"},
        "records_per_shard": 3,
        "max_unreadable": 0.1,
    }
    return Pass(**settings | changes)


def start(work: Pass, seconds: float = 0) -> Write:
    """Copies the records; waits before each and says so."""

    def write(shard: Shard) -> Written:
        part = Part(work.source, shard.numbers)
        unreadable = [part.name(i) for i in range(len(part)) if part[i]["image"] == b"this is text"]

        def kept():
            for place in range(len(part)):
                shard.tell(place, unreadable)
                time.sleep(seconds)
                if part.name(place) not in unreadable:
                    yield part[place]

        return Written(write_array_record(shard.path, kept()), unreadable)

    return write


def main() -> None:
    """What the processes of the tests run."""
    pictures, folder, index, count, seconds = sys.argv[1:]
    one = work(Path(pictures), Path(folder))
    run(one, (int(index), int(count)), lambda: start(one, float(seconds)))


def process(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.test_shard_pass", *map(str, arguments)]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)


def contents(folder: Path) -> list:
    shards = prepared.shards(folder, FORMAT)
    source = ArrayRecordSource(shards)
    return [source[i] for i in range(len(source))]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("captions-*")}


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_records(tmp_path / "pictures.array_record", PICTURES)


@pytest.fixture
def unbroken(pictures, tmp_path) -> Path:
    one = work(pictures, tmp_path / "unbroken")
    run(one, (0, 1), lambda: start(one))
    return tmp_path / "unbroken"


def test_a_pass_by_one_process(pictures, unbroken):
    assert contents(unbroken) == records(PICTURES)
    report = prepared.read_report(unbroken, FORMAT)
    assert (report["records"], report["model"], report["content"]) == (PICTURES, "abc", "captions")
    assert list(report["shards"]) == [f"captions-{n:05}-of-00007.array_record" for n in range(7)]


def test_each_process_makes_its_share_and_the_last_one_the_report(pictures, unbroken, tmp_path):
    one = work(pictures, tmp_path / "out")
    for index, made in ((2, 2), (0, 5), (1, 7)):
        run(one, (index, 3), lambda: start(one))
        assert len(files(one.folder)) == made
        if made < 7:
            with pytest.raises(UserError, match=r"seed_jax\.test has not finished there"):
                contents(one.folder)
    assert files(one.folder) == files(unbroken)
    assert contents(one.folder) == records(PICTURES)


def test_processes_at_once_of_which_one_is_killed(pictures, unbroken, tmp_path):
    """Two share the pass, a third does what the first does; the second is killed in a shard."""
    out = tmp_path / "out"
    running = [process(pictures, out, index, 2, 0.1) for index in (0, 1, 0)]
    killed = running[1]
    while not list(out.glob(f".captions-*-{killed.pid}.partial")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    ends = [one.communicate(timeout=300) for one in running]
    assert [one.returncode for one in running] == [0, -signal.SIGKILL, 0], ends
    assert list(out.glob(".captions-*.partial"))
    assert len(files(out)) < 7
    with pytest.raises(UserError, match="not finished"):
        contents(out)

    before = {file: file.stat().st_mtime_ns for file in out.glob("captions-*")}
    one = work(pictures, out)
    run(one, (0, 1), lambda: start(one))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert files(out) == files(unbroken)
    assert (out / "report.json").read_text() == (unbroken / "report.json").read_text()
    assert not list(out.glob(".captions-*.partial"))


def test_what_is_whole_is_not_made_again(pictures, unbroken, capsys):
    def never() -> Write:
        raise AssertionError

    one = work(pictures, unbroken)
    capsys.readouterr()
    run(one, (0, 1), never)
    assert "20 records in 7 shards (all there already)" in capsys.readouterr().out
    # As when a folder is copied without its hidden files.
    for entry in (unbroken / ".shards").iterdir():
        entry.unlink()
    run(one, (0, 1), never)


@pytest.mark.parametrize("change", ["missing", "short", "strange"])
def test_a_shard_that_is_not_as_it_was_written(pictures, unbroken, change):
    shard = unbroken / "captions-00001-of-00007.array_record"
    whole = shard.read_bytes()
    if change == "missing":
        shard.unlink()
        message = r"captions-00001-of-00007\.array_record is missing .* again by seed_jax\.test"
    elif change == "short":
        shard.write_bytes(whole[:-1])
        message = rf"00001-of-00007.array_record has {len(whole) - 1} bytes where {len(whole)} were"
    else:
        (unbroken / "captions-00007.array_record").write_bytes(whole)
        message = r"captions-00007\.array_record is not in .*report\.json"
    with pytest.raises(UserError, match=message):
        contents(unbroken)
    if change != "strange":
        one = work(pictures, unbroken)
        run(one, (0, 1), lambda: start(one))
        assert shard.read_bytes() == whole
        assert contents(unbroken) == records(PICTURES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"model": "def"}}, "was made with model abc, now it would be def; name"),
        ({"suffix": ".parquet"}, "made with files array_record, now it would be parquet"),
        ({"records_per_shard": 4}, "made with records_per_shard 3, now it would be 4"),
        ({"format": "seed_jax.prepare 1"}, r"written by seed_jax\.test 1, where a folder of seed"),
    ],
)
def test_a_folder_of_other_settings_is_refused(pictures, unbroken, changes, message):
    before = (unbroken / "report.json").read_text()
    one = work(pictures, unbroken, **changes)
    with pytest.raises(UserError, match=message):
        run(one, (0, 1), lambda: start(one))
    assert (unbroken / "report.json").read_text() == before


def test_a_folder_of_other_pictures_or_of_something_else_is_refused(pictures, unbroken, tmp_path):
    rows = records(PICTURES)
    write_array_record(pictures, rows[:-1])
    with pytest.raises(UserError, match="made with pictures 20, now it would be 19"):
        run(work(pictures, unbroken), (0, 1), lambda: None)
    write_array_record(pictures, rows[::-1])
    with pytest.raises(UserError, match="made with pictures_hash"):
        run(work(pictures, unbroken), (0, 1), lambda: None)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="notes holds something else already"):
        run(work(pictures, tmp_path / "notes"), (0, 1), lambda: None)
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match=r"where a folder of seed_jax\.prepare 1 is wanted"):
        open_source(unbroken)


def test_too_many_unreadable_pictures_of_a_process_or_of_all(pictures, tmp_path):
    """One in each of two shards of the second process; each shard alone would pass."""
    write_records(pictures, PICTURES, unreadable=(4, 10))
    one = work(pictures, tmp_path / "out", max_unreadable=0.15)
    run(one, (0, 2), lambda: start(one))
    with pytest.raises(UserError, match=r"2 of 9 pictures can't be read: picture-4, picture-10; m"):
        run(one, (1, 2), lambda: start(one))
    assert len(files(one.folder)) == 5
    more = work(pictures, tmp_path / "out", max_unreadable=0.25)
    run(more, (1, 2), lambda: start(more))
    assert [one["id"] for one in contents(more.folder)] == [
        f"picture-{n}" for n in range(PICTURES) if n not in (4, 10)
    ]
    assert prepared.read_report(more.folder, FORMAT)["unreadable"] == 2
    strict = work(pictures, tmp_path / "out", max_unreadable=0.05)
    with pytest.raises(UserError, match="2 of 20 pictures can't be read"):
        run(strict, (0, 1), lambda: start(strict))


def test_a_full_disk_is_told_and_leaves_no_part_behind(pictures, tmp_path):
    one = work(pictures, tmp_path / "out")

    def write(shard: Shard) -> Written:
        shard.path.write_bytes(b"half")
        with open("/dev/full", "wb") as full:
            full.write(b"x")
        return Written(0, [])

    with pytest.raises(UserError, match=r"captions-00000-of-00007.* can't be written \(No space"):
        run(one, (0, 1), lambda: write)
    assert not list(one.folder.glob(".captions*"))


@pytest.mark.parametrize(
    ("index", "count", "environ", "expected"),
    [
        (None, None, {}, (0, 1)),
        (2, 5, {"JAX_NUM_PROCESSES": "9", "JAX_PROCESS_ID": "8"}, (2, 5)),
        (None, None, {"JAX_NUM_PROCESSES": "9", "JOB_COMPLETION_INDEX": "8"}, (8, 9)),
        (None, None, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (3, 4)),
        (None, None, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
        (None, None, {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "1"}, (1, 3)),
    ],
)
def test_which_share_is_a_processs_own(index, count, environ, expected):
    assert hosts.share(index, count, environ) == expected


@pytest.mark.parametrize(
    ("index", "count", "environ", "message"),
    [
        (None, 4, {}, "--process_id must be given too"),
        (1, None, {}, "--num_processes must be given too"),
        (None, None, {"JOB_COMPLETION_INDEX": "0"}, "--num_processes must be given too"),
        (4, 4, {}, "--process_id=4 must be from 0 to 3"),
    ],
)
def test_shares_that_cannot_be(index, count, environ, message):
    with pytest.raises(UserError, match=message):
        hosts.share(index, count, environ)


if __name__ == "__main__":
    main()
