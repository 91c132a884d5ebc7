"""A run's folder: for one run at a time, of one config, and all of its processes see the same."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from seed_jax import files, hosts
from seed_jax.cli import UserError

LOCK, CONFIG, METRICS = "run.lock", "config.json", "metrics.jsonl"

# What may differ between two runs in one workdir: how long, how often, and on which machines.
FREE_TO_CHANGE = {
    "steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "mesh",
    "accumulate",
    "remat",
}
# The same of `config.data`, which is otherwise compared whole.
FREE_OF_DATA = {"workers", "cache"}


@contextlib.contextmanager
def held(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Keeps other runs out of the workdir while the block runs, and notes the config there.

    Raises:
      UserError: another run is in it, it was trained with another config, or the processes of this
        run were given different configs or folders.
    """
    wanted = json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"
    with contextlib.ExitStack() as stack:
        if hosts.is_first():
            stack.enter_context(locked(workdir))
            _note(workdir / CONFIG, wanted)
        if len(set(hosts.gather(wanted))) > 1:
            raise UserError("the processes of this run were started with different configs")
        try:
            seen = (workdir / CONFIG).read_text()
        except FileNotFoundError:
            seen = ""
        if seen != wanted:
            raise UserError(
                f"{workdir} here is not the {workdir} of process 0; take a --workdir on a file "
                "system that all hosts share"
            )
        yield


@contextlib.contextmanager
def locked(workdir: Path, option: str = "--workdir") -> Iterator[None]:
    """Holds WORKDIR/run.lock, which the system takes back when this process ends, however."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {workdir}: {error.strerror}; name another folder") from None
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{workdir} is in use by another run ({file.read().strip()}); wait until it "
                    f"has ended, stop it, or take a new {option}"
                ) from None
            # Some network file systems know no locks.
            print(f"warning: {file.name} can't be locked: {error.strerror}", file=sys.stderr)
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
        file.flush()
        yield


def _note(file: Path, wanted: str) -> None:
    """Writes the config, or checks that it is the one that is there."""
    # A first try that failed before it trained binds nobody.
    trained = any(file.parent.glob("checkpoints/*")) or (file.parent / METRICS).exists()
    if trained and file.exists():
        there, new = (_binding(json.loads(text)) for text in (file.read_text(), wanted))
        differing = sorted(
            name for name in there.keys() | new.keys() if there.get(name) != new.get(name)
        )
        if differing:
            raise UserError(
                f"{file.parent} was trained with another config (differs in "
                f"{', '.join(differing)}); take a new --workdir, or the config it was trained with"
            )
    files.replace_text(file, wanted)


def _binding(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config may not differ."""
    kept = {name: value for name, value in config.items() if name not in FREE_TO_CHANGE}
    data = config.get("data", {})
    return kept | {"data": {name: data[name] for name in data.keys() - FREE_OF_DATA}}


def shard_not_written(shard: Path, why: str) -> UserError:
    """What a command that goes on shard by shard says where one can't be written."""
    return UserError(
        f"{shard} can't be written ({why}); make room there and run the same command again, which "
        "goes on with this shard"
    )
