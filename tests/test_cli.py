"""What every command line shares: mistakes in one line, and nothing replaced that is not ours."""

import errno
import io
import os
import sys

import pytest

from seed_jax import cli, files
from seed_jax.cli import UserError


def ended(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as error:
        cli.run(main)
    return error.value.code, capsys.readouterr().err


def test_errors_of_files_are_one_line_and_others_are_not_hidden(tmp_path, capsys):
    gone = tmp_path / "gone" / "codes.jsonl"
    assert ended(gone.read_text, capsys) == (2, f"error: {gone}: No such file or directory\n")

    def full() -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")
        except OSError as error:
            raise RuntimeError("the writer gave up") from error

    status, told = ended(full, capsys)
    assert (status, told.count("\n")) == (2, 1)
    assert "No space left on device; make room" in told

    def bug() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(bug)


def test_names_that_no_encoding_has_are_printed(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    cli.run(lambda: print("caf\udce9.jpg", flush=True))
    assert written.getvalue() == b"caf\\udce9.jpg\n"


def test_the_first_of_many():
    assert cli.few(["a", "b", "c"]) == "a, b, c"
    assert cli.few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({}, None),
        ({"config.json": '{"content_hash": "0"}'}, None),
        ({"README.md": "- exported from the seed_jax model with content hash `0`"}, None),
        ({"config.json": '{"model_type": "opt"}', "README.md": "mine"}, "holds something else"),
        ({"opt/config.json": '{"content_hash": "0"}'}, "holds something else"),
        (None, "is a file"),
    ],
)
def test_what_is_replaced_is_what_was_written_here(tmp_path, there, message):
    output = tmp_path / "out"
    if there is None:
        output.write_text("mine")
    else:
        output.mkdir()
    for name, text in (there or {}).items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(text)
    if message is None:
        cli.refuse_existing(output, overwrite=True)
    else:
        with pytest.raises(UserError, match=message):
            cli.refuse_existing(output, overwrite=True)
    with pytest.raises(UserError, match="exists; name another"):
        cli.refuse_existing(output, overwrite=False)


def test_what_did_not_end_well_leaves_nothing(tmp_path):
    def write() -> None:
        with files.replaced_when_whole(tmp_path / "out") as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []
