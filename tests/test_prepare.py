"""Shards from tars, parquet, annotations and folders; damage, kills, and what is left out."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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


def test_names_that_are_not_utf_8_are_left_out(tmp_path):
    folder = write_folder(tmp_path / "pictures", 3)
    name = os.fsdecode(b"caf\xe9")
    (folder / f"{name}.png").write_bytes(picture(9))
    (folder / "captions.jsonl").unlink()
    for file in folder.rglob("*.png"):
        file.with_suffix(".txt").write_text("a cat")
    run(folder, tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 3
    assert dropped(tmp_path / "out") == {f"{name}.png": "name not UTF-8"}


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
    with pytest.raises(UserError, match=r"was made from another options .*name another --output"):
        run(folder, tmp_path / "one", "--split", "train")
    with pytest.raises(UserError, match=r"holds something else already; name another --output"):
        run(folder, folder)


def test_the_other_layouts_of_tars(tmp_path):
    """Compressed; captions in .json; pictures first and captions after; files that mean nothing."""
    files = {f"a/{n}.PNG": picture(n) for n in range(2)} | {"._x.png": b"", "a/0.npy": b"1"}
    files["a/0.json"] = json.dumps({"caption": "zero"}).encode()
    files["a/1.json"] = json.dumps({"captions": ["one", "eins"]}).encode()
    write_tar(tmp_path / "in" / "deep" / "x.tar.gz", files, "w:gz")
    run(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == [
        ("deep/x/a/0", picture(0), ["zero"]),
        ("deep/x/a/1", picture(1), ["one", "eins"]),
    ]


def write_table(file: Path, columns: dict, rows_in_group: int = 2) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=rows_in_group)
    return file


def test_parquet(tmp_path):
    images = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(5)]
    images[3]["bytes"] = None
    texts = [[f"cat {n}", " dog"] for n in range(5)]
    columns = {"image": images, "caption": texts, "split": [*"abaaa"], "id": [7, 8, 9, 10, 7]}
    (tmp_path / "in").mkdir()
    write_table(tmp_path / "in" / "x.parquet", columns)
    report = run(tmp_path / "in", tmp_path / "out", "--shard-size", "2", "--split", "a")
    assert contents(tmp_path / "out") == [
        ("x/7", picture(0), ["cat 0", "dog"]),
        ("x/9", picture(2), ["cat 2", "dog"]),
    ]
    # The last row's number was in another row group, which another process may read.
    reasons = {"x/8": "other split", "x/10": "no picture", "x/7": "duplicate id"}
    assert dropped(tmp_path / "out") == reasons
    assert len(report["shards"]) == 2


def test_parquet_columns_and_damage(tmp_path):
    plain = {"jpg": [picture(n) for n in range(3)], "words": ["x", "y", "z"]}
    table = write_table(tmp_path / "x.parquet", plain)
    with pytest.raises(UserError, match=r"\(jpg, words\).*name it by --caption-column"):
        run(table, tmp_path / "out")
    with pytest.raises(UserError, match=r"no column 'w'; its columns: jpg, words"):
        run(table, tmp_path / "out", "--caption-column", "w")
    with pytest.raises(UserError, match=r"column 'words' holds string, not pictures"):
        run(table, tmp_path / "out", "--caption-column", "words", "--image-column", "words")
    run(table, tmp_path / "out", "--caption-column", "words")
    assert [captions for _, _, captions in contents(tmp_path / "out")] == [["x"], ["y"], ["z"]]
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"x\.parquet.* is damaged after 0 good pictures"):
        run(table, tmp_path / "damaged", "--caption-column", "words")


ADDRESSES = [f"https://example.org/{n}.jpg" for n in range(4)]
ANNOTATIONS = {
    "coco.json": {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(4)],
        "annotations": [{"id": n, "image_id": n, "caption": f"cat {n}"} for n in range(4)],
    },
    "list.json": [{"id": n, "image": f"{n}.png", "caption": f"cat {n}"} for n in range(4)],
    "flickr.token": "".join(f"{n}.png#0\tcat {n}\n" for n in range(4)),
    "cc3m.tsv": "".join(f"cat {n}\t{ADDRESSES[n]}\n" for n in range(4)),
    "cc12m.tsv": "".join(f"{ADDRESSES[n]}\tcat {n}\n" for n in range(4)),
    "named.tsv": "filepath\ttitle\n" + "".join(f"{n}.png\tcat {n}\n" for n in range(4)),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotation_files_and_pictures_that_were_never_downloaded(tmp_path, name):
    content, file = ANNOTATIONS[name], tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "images").mkdir()
    downloaded = "https://" in str(content)
    for n in (0, 1, 3):
        called = str(zlib.crc32(ADDRESSES[n].encode())) if downloaded else f"{n}.png"
        (tmp_path / "images" / called).write_bytes(picture(n))
    run(file, tmp_path / "out", "--images", str(tmp_path / "images"))
    found = contents(tmp_path / "out")
    assert [one[1:] for one in found] == [(picture(n), [f"cat {n}"]) for n in (0, 1, 3)]
    assert [int(one[0]) for one in found] == [0, 1, 3]
    assert {int(name): why for name, why in dropped(tmp_path / "out").items()} == {2: "no picture"}


def test_a_killed_run_goes_on_with_the_shards_it_lacks(tmp_path):
    """In two processes, which must die with the one that was killed, and in this one."""
    large, tars = picture(0, size=500), tmp_path / "tars"
    for number in range(20):
        files = {
            f"{n}.{suffix}": data
            for n in range(6)
            for suffix, data in (("png", large), ("txt", f"cat {number}".encode()))
        }
        write_tar(tars / f"{number:02}.tar", files)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "seed_jax.prepare", "--input", str(tars), "--output", str(out)]
    command += ["--processes", "2", "--min-size", "8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(out.glob("shard-*")):
            time.sleep(0.01)
        process.kill()
        # Open as long as a process of the run lives.
        process.communicate(timeout=60)
    first = {file: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    assert 0 < len(first) < 20
    with pytest.raises(UserError, match="prepare has not finished there; run its command again"):
        open_source(out)
    again, unbroken = run(tars, out), run(tars, tmp_path / "unbroken")
    assert {file: file.stat().st_mtime_ns for file in first} == first
    assert not list(out.glob(".*.partial"))
    assert contents(out) == contents(tmp_path / "unbroken")
    assert len(contents(out)) == 120
    assert again["content_hash"] == unbroken["content_hash"]


@pytest.mark.parametrize("change", ["missing", "short", "strange"])
def test_a_shard_that_is_not_as_it_was_written(tmp_path, change):
    tars, out = write_tars(tmp_path / "tars", 3), tmp_path / "out"
    report = run(tars, out)
    shard = out / "shard-00001.array_record"
    whole = shard.read_bytes()
    if change == "missing":
        shard.unlink()
        message = r"shard-00001\.array_record is missing \(.*report\.json lists 3 shards\)"
    elif change == "short":
        shard.write_bytes(whole[:-1])
        message = rf"shard-00001.array_record has {len(whole) - 1} bytes where {len(whole)} were"
    else:
        (out / "shard-00007.array_record").write_bytes(whole)
        message = r"shard-00007\.array_record is not in .*report\.json"
    with pytest.raises(UserError, match=message):
        open_source(out)
    assert run(tars, out) == report
    assert shard.read_bytes() == whole
    assert len(open_source(out)) == 9
