"""Shards from tars, parquet, annotations and folders; damage, kills, and what is left out."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from seed_jax import prepare
from seed_jax.cli import UserError
from seed_jax.data.sources import open_source
from tests.pictures import picture, write_folder


def run(path: Path, output: Path, *more: str) -> dict:
    """Prepares in this process; returns the report."""
    arguments = ["--input", str(path), "--output", str(output), "--min-size", "8", *more]
    if "--processes" not in more:
        arguments += ["--processes", "1"]
    prepare.main(arguments)
    return json.loads((output / "report.json").read_text())


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(*numbers: int) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number in numbers:
        files[f"{number:05}.png"] = picture(number)
        files[f"{number:05}.txt"] = f"cat {number}".encode()
    return files


def write_tars(folder: Path, count: int, size: int = 3) -> Path:
    for number in range(count):
        first = number * size
        write_tar(folder / f"{number:05}.tar", samples(*range(first, first + size)))
    return folder


def contents(output: Path) -> list[tuple[str, bytes, list[str]]]:
    source = open_source(output)
    records = [source[i] for i in range(len(source))]
    return [(record["id"], record["image"], record["captions"]) for record in records]


def dropped(output: Path) -> dict[str, str]:
    lines = (output / "dropped.jsonl").read_text().splitlines()
    return {entry["id"]: entry["why"] for entry in map(json.loads, lines)}


def test_tars_become_shards_that_training_reads(tmp_path):
    tars = write_tars(tmp_path / "tars", 3)
    report = run(tars, tmp_path / "out")
    assert contents(tmp_path / "out") == [
        (f"{n // 3:05}/{n:05}", picture(n), [f"cat {n}"]) for n in range(9)
    ]
    assert (report["pictures"], len(report["shards"]), report["dropped"]) == (9, 3, {})


def test_what_is_left_out_is_named_with_its_reason(tmp_path):
    files = samples(0, 1, 2, 3, 4, 5)
    files["00001.png"] = b"this is text"
    files["00002.png"] = picture(2)[:150]
    files["00003.png"] = picture(3, size=7)
    files["00004.txt"] = b" \n"
    del files["00005.png"]
    tar = write_tar(tmp_path / "x.tar", files)
    with tarfile.open(tar, "a") as more:
        member = tarfile.TarInfo("00000.png")
        member.size = len(picture(9))
        more.addfile(member, io.BytesIO(picture(9)))
    report = run(tar, tmp_path / "out")
    assert contents(tmp_path / "out") == [("x/00000", picture(0), ["cat 0"])]
    assert dropped(tmp_path / "out") == {
        "x/00000": "duplicate id",
        "x/00001": "unreadable",
        "x/00002": "unreadable",
        "x/00003": "too small",
        "x/00004": "no caption",
        "x/00005": "no picture",
    }
    assert report["dropped"] == {
        "duplicate id": 1,
        "unreadable": 2,
        "too small": 1,
        "no caption": 1,
        "no picture": 1,
    }


def overwrite_header(tar: Path) -> None:
    """Garbage in place of the third picture's header; its reader would take it for the end."""
    with tarfile.open(tar) as opened:
        offset = opened.getmembers()[4].offset
    data = bytearray(tar.read_bytes())
    data[offset : offset + 512] = b"\xff" * 512
    tar.write_bytes(data)


def cut_short(tar: Path) -> None:
    with tarfile.open(tar) as opened:
        third = opened.getmembers()[4]
    tar.write_bytes(tar.read_bytes()[: third.offset_data + 20])


def cut_between(tar: Path) -> None:
    with tarfile.open(tar) as opened:
        third = opened.getmembers()[4]
    tar.write_bytes(tar.read_bytes()[: third.offset])


@pytest.mark.parametrize("damage", [overwrite_header, cut_short, cut_between])
def test_a_damaged_tar_is_named_and_costs_no_other(tmp_path, damage):
    tars, out = write_tars(tmp_path / "tars", 3), tmp_path / "out"
    whole = (tars / "00001.tar").read_bytes()
    damage(tars / "00001.tar")
    with pytest.raises(UserError, match=r"00001.tar is damaged after 2 good pictures: .*--damaged"):
        run(tars, out)
    others = {name: (out / name).stat().st_mtime_ns for name in ("shard-00000.array_record",)}
    with pytest.raises(UserError, match=r"prepare has not finished there"):
        open_source(out)

    report = run(tars, out, "--damaged", "keep")
    ids = [f"{n // 3:05}/{n:05}" for n in range(9)]
    assert [one[0] for one in contents(out)] == ids[:5] + ids[6:]
    assert "good part kept" in report["damaged"]["00001.tar"]
    assert others == {name: (out / name).stat().st_mtime_ns for name in others}

    report = run(tars, out, "--damaged", "skip")
    assert [one[0] for one in contents(out)] == ids[:3] + ids[6:]
    assert "left out" in report["damaged"]["00001.tar"]

    (tars / "00001.tar").write_bytes(whole)
    assert run(tars, out)["damaged"] == {}
    assert [one[0] for one in contents(out)] == ids


def test_a_folder_and_its_order(tmp_path):
    folder = write_folder(tmp_path / "in", 5)
    one = run(folder, tmp_path / "one", "--shard-size", "2")
    source = open_source(folder)
    assert contents(tmp_path / "one") == [
        (source[i]["id"], source[i]["image"], source[i]["captions"]) for i in range(5)
    ]
    assert [shard["pictures"] for shard in one["shards"].values()] == [2, 2, 1]
