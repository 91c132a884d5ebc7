"""Codes by shards: what is written equals codes.jsonl, and what reads them tells what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seed_jax import model_dir
from seed_jax.cli import UserError
from seed_jax.data import codes, pipeline
from seed_jax.data.codes import CodesTable
from seed_jax.data.sources import open_source
from seed_jax.tokenize import main
from tests import stages
from tests.tiny import CODES, QUERIES, save_tokenizer, write_pictures

PICTURES = 13
FOLDERS = ("array_record", "parquet")

# What is written once serves all tests.
pytestmark = pytest.mark.xdist_group("codes")


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """model/, another/, pictures/, and their codes: codes.jsonl, array_record/ and parquet/."""
    folder = tmp_path_factory.mktemp("codes")
    save_tokenizer(folder / "model")
    save_tokenizer(folder / "another", seed=1)
    write_pictures(folder / "pictures", PICTURES)
    tokenize(folder, folder / "codes.jsonl")
    for kind in FOLDERS:
        tokenize(folder, folder / kind, f"--format={kind}", "--records-per-shard=4")
    return folder


def arguments(there: Path, output: Path, *more: str, model: str = "model") -> list[str]:
    named = {"model": there / model, "images": there / "pictures", "output": output}
    return [*(f"--{name}={value}" for name, value in named.items()), "--batch-size=5", *more]


def tokenize(there: Path, output: Path, *more: str, **changes) -> None:
    main(arguments(there, output, *more, **changes))


def hash_of(model: Path) -> str:
    return model_dir.describe(model)["content_hash"]


def read(there: Path, path: Path, *, queries: int = QUERIES, size: int = CODES) -> dict:
    parts = [*codes.read(path, hash_of(there / "model"), queries=queries, size=size)]
    names = [name for part in parts for name in part.names]
    codes_PQ = np.concatenate([part.codes_PQ for part in parts])
    return dict(zip(names, codes_PQ.tolist(), strict=True))


def lines(there: Path) -> dict:
    rows = map(json.loads, (there / "codes.jsonl").read_text().splitlines())
    return {row["image"]: row["codes"] for row in rows}


@pytest.mark.parametrize("kind", ["codes.jsonl", *FOLDERS])
def test_all_forms_say_the_same(there, kind):
    found, expected = read(there, there / kind), lines(there)
    assert len(found) == PICTURES
    assert list(found.items()) == list(expected.items())
    table = CodesTable(there / kind, hash_of(there / "model"), queries=QUERIES, size=CODES)
    assert {name: table[name] for name in expected} == expected
    with pytest.raises(UserError, match=r"lacks the codes of 099\.png"):
        table["099.png"]


def test_parquet_is_what_others_expect(there):
    files = sorted((there / "parquet").glob("*.parquet"))
    assert [file.name for file in files] == [f"codes-{n:05}-of-00004.parquet" for n in range(4)]
    table = pa.concat_tables(map(pq.read_table, files))
    assert table.schema.field("image").type == pa.string()
    assert table.schema.field("codes").type == pa.list_(pa.int32(), QUERIES)
    assert dict(zip(*map(pa.ChunkedArray.to_pylist, table.columns), strict=True)) == lines(there)
    assert table.schema.metadata[b"model"].decode() == hash_of(there / "model")[:16]


def test_the_report(there):
    report = json.loads((there / "array_record" / "report.json").read_text())
    assert {key: report[key] for key in ("complete", "content", "model", "records")} == {
        "complete": True,
        "content": "codes",
        "model": hash_of(there / "model")[:16],
        "records": PICTURES,
    }
    assert [shard["records"] for shard in report["shards"].values()] == [4, 4, 4, 1]


def test_two_processes_at_once_write_what_one_does(there, tmp_path):
    """As srun starts them."""
    more = ("--format=parquet", "--records-per-shard=4")
    command = [sys.executable, "-m", "seed_jax.tokenize"]
    command += arguments(there, tmp_path / "out", *more)
    slurm = [{"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(index)} for index in range(2)]
    running = [
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
        for environ in ({**os.environ, **one} for one in slurm)
    ]
    ends = [one.communicate(timeout=600) for one in running]
    assert [one.returncode for one in running] == [0, 0], ends
    assert contents(tmp_path / "out") == contents(there / "parquet")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("kind", FOLDERS)
def test_another_models_folder_is_refused(there, kind):
    before = contents(there / kind)
    more = (f"--format={kind}", "--records-per-shard=4")
    with pytest.raises(UserError, match=rf"{kind} was made with model \w+, now it would be \w+; n"):
        tokenize(there, there / kind, *more, model="another")
    assert contents(there / kind) == before
    with pytest.raises(UserError, match=rf"{kind} has codes of another tokenizer"):
        CodesTable(there / kind, hash_of(there / "another"), queries=QUERIES, size=CODES)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("change", ["missing", "short", "damaged", "unfinished"])
def test_a_folder_that_is_not_whole(there, kind, change, tmp_path):
    folder = shutil.copytree(there / kind, tmp_path / "out")
    shard = folder / f"codes-00001-of-00004.{kind}"
    whole = shard.read_bytes()
    if change == "missing":
        shard.unlink()
        message = r"codes-00001-of-00004\.\w+ is missing .* again by seed_jax\.tokenize"
    elif change == "short":
        shard.write_bytes(whole[:-1])
        message = rf"codes-00001-of-00004\.\w+ has {len(whole) - 1} bytes where"
    elif change == "damaged":
        # An ArrayRecord file is padded, so in the middle there may be nothing.
        shard.write_bytes(whole[:8] + bytes(b ^ 255 for b in whole[8:200]) + whole[200:])
        message = r"codes-00001-of-00004\.\w+ is damaged \(.*makes it again"
    else:
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps(report | {"complete": False}))
        message = r"seed_jax\.tokenize has not finished there"
    with pytest.raises(UserError, match=message) as error:
        read(there, folder)
    assert "\n" not in str(error.value)
    if change == "damaged":
        shard.unlink()
    tokenize(there, folder, f"--format={kind}", "--records-per-shard=4")
    assert shard.read_bytes() == whole
    assert read(there, folder) == lines(there)


@pytest.mark.parametrize("kind", FOLDERS)
def test_codes_that_the_model_does_not_have(there, kind):
    top = max(max(row) for row in lines(there).values())
    with pytest.raises(UserError, match=rf"record \d+: there is no code {top}; they go from 0"):
        read(there, there / kind, size=top)
    with pytest.raises(UserError, match=rf"record 0 has {QUERIES} codes; this model makes 3"):
        read(there, there / kind, queries=3)


@pytest.mark.parametrize("kind", FOLDERS)
def test_stage_3_reads_the_same_batches(there, kind, tmp_path):
    expected, found = (
        batches(there, there / name, tmp_path / name) for name in ("codes.jsonl", kind)
    )
    for first, second in zip(expected, found, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
    assert (expected[0]["pair_ids"] >= 0).all()


def batches(there: Path, known: Path, folder: Path) -> list[pipeline.Batch]:
    config, _ = stages.make("seed_opt", folder)
    with config.unlocked():
        config.update(init=str(there / "model"), codes=str(known), image_size=0)
    task = stages.SeedOPTTraining(config)
    data = pipeline.train_pipeline(
        open_source(there / "pictures"),
        batch_size=4,
        image_size=0,
        texts=task.text_fields(),
        data=config.data,
        seed=1,
    )
    try:
        return [next(data) for _ in range(5)]
    finally:
        data.close()


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_shard_of_unreadable_pictures_alone(there, kind, tmp_path, capsys):
    shutil.copytree(there / "pictures", tmp_path / "pictures")
    shutil.copytree(there / "model", tmp_path / "model")
    (tmp_path / "pictures" / "012.png").write_text("not a picture")
    more = (f"--format={kind}", "--records-per-shard=4")
    with pytest.raises(UserError, match=r"1 of 13 pictures can't be read: 012\.png"):
        tokenize(tmp_path, tmp_path / "out", *more)
    tokenize(tmp_path, tmp_path / "out", *more, "--max-unreadable=0.1")
    assert "012.png" in capsys.readouterr().out
    expected = lines(there)
    del expected["012.png"]
    assert read(tmp_path, tmp_path / "out") == expected


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_name_that_is_not_unicode(there, kind, tmp_path):
    shutil.copytree(there / "pictures", tmp_path / "pictures")
    shutil.copytree(there / "model", tmp_path / "model")
    (tmp_path / "pictures" / "000.png").rename(os.fsdecode(bytes(tmp_path) + b"/pictures/\xff.png"))
    (tmp_path / "pictures" / "captions.jsonl").unlink()
    with pytest.raises(UserError, match=r"'\\udcff\.png': the name is not UTF-8"):
        tokenize(tmp_path, tmp_path / "out", f"--format={kind}")


def test_lines_may_have_any_name(tmp_path):
    line = {"image": "\udcff.png", "codes": [1, 2], "model": "0" * 64}
    (tmp_path / "codes.jsonl").write_text(json.dumps(line) + "\n")
    table = CodesTable(tmp_path / "codes.jsonl", "0" * 64, queries=2, size=4)
    assert table["\udcff.png"] == [1, 2]
    (tmp_path / "codes.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"codes\.jsonl:1 is no line of codes"):
        CodesTable(tmp_path / "codes.jsonl", "0" * 64, queries=2, size=4)


def test_formats_and_outputs_that_do_not_go_together(there, tmp_path):
    with pytest.raises(UserError, match=r"is a folder; name a file, or give --format array_rec"):
        tokenize(there, tmp_path)
    with pytest.raises(UserError, match=r"--format parquet writes a folder; .*x\.jsonl is none"):
        tokenize(there, tmp_path / "x.jsonl", "--format=parquet")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file: Not a directory; name another folder"):
        tokenize(there, tmp_path / "file", "--format=parquet")
    with pytest.raises(UserError, match=r"by one process alone, not by 3; give --format"):
        tokenize(there, tmp_path / "x.jsonl", "--process-id=0", "--num-processes=3")
    with pytest.raises(UserError, match=r"pictures holds no codes; python -m seed_jax\.tokenize"):
        read(there, there / "pictures")
