"""Several processes that train as one: how they find one another, agree, and part.

A process drives all the devices that it sees. Who starts them says how many there are and which
this one is, by flags or in the environment (see `find`); left alone, a process trains by itself.
"""

import contextlib
import itertools
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from absl import flags
from jax._src import distributed

from seed_jax.cli import UserError, first_line

# How long processes wait for one another: to come up, then to say what they know of, and, when one
# of them gives up, to give up too.
START_SECONDS = 600
ANSWER_SECONDS = 1800
FAILURE_SECONDS = 5

# What `gather` finds of a process that failed, and in front of what one said.
FAILED, SAID = "failed", "said "

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "With several processes: HOST:PORT of process 0, a port free to take."
)
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_INDEX = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_DISCOVER = flags.DEFINE_bool(
    "discover", False, "Lets JAX find the other processes, as on the hosts of a Cloud TPU pod."
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "A process that is silent for so long stops the others.", 10
)

_rounds = itertools.count()


def find(flag_values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs to know; None if this process trains by itself.

    Each of coordinator, number and index comes from, in this order: the flag;
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; for an indexed Kubernetes job
    JOB_COMPLETION_INDEX; under SLURM's srun its variables. TPU hosts on GKE are found by JAX, those
    of Cloud TPU on request.

    Raises:
      UserError: some of the three are known, but not all, or one of them can't be.
    """
    if flag_values.get("discover") or "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return {}
    known = _known(flag_values, environ)
    coordinator, count, index = known.values()
    if coordinator is None and count is None:
        return None
    if coordinator is None and _in_slurm(environ):
        return {}
    missing = [f"--{name}" for name, value in known.items() if value is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given too: the processes of a run are known by "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        )
    _, colon, port = str(coordinator).rpartition(":")
    if not (colon and port.isdecimal()):
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, such as node001:8476")
    index, count = _checked(index, count)
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",  # of devices too: a process takes all it sees
    }


def share(index: int | None, count: int | None, environ: Mapping[str, str]) -> tuple[int, int]:
    """This process's number, and how many there are, of work that needs no word between them.

    Each comes from, in this order: the argument, unless it is None; JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; JOB_COMPLETION_INDEX; SLURM's variables; those of GKE's TPU slices. Where
    nothing says how many there are or which this is, it does it all.

    Raises:
      UserError: one of the two is lacking, or they can't be.
    """
    known = _known({"num_processes": count, "process_id": index}, environ)
    number, total = known["process_id"], known["num_processes"]
    workers = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if total is None and len(workers) > 1:
        total = len(workers)
        number = environ.get("TPU_WORKER_ID") if number is None else number
    if total is None and number is None:
        return 0, 1
    if total is None or number is None:
        lacking = "num_processes" if total is None else "process_id"
        raise UserError(f"--{lacking} must be given too: which of how many processes this is")
    return _checked(number, total)


def _known(flag_values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Coordinator, number and index, each None if nobody said."""
    slurm = _in_slurm(environ)
    names = {
        "coordinator": ("JAX_COORDINATOR_ADDRESS",),
        "num_processes": ("JAX_NUM_PROCESSES", *["SLURM_STEP_NUM_TASKS"] * slurm),
        "process_id": ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", *["SLURM_PROCID"] * slurm),
    }
    known: dict[str, Any] = {}
    for name, variables in names.items():
        values = [flag_values.get(name), *map(environ.get, variables)]
        known[name] = next((value for value in values if value not in (None, "")), None)
    return known


def _in_slurm(environ: Mapping[str, str]) -> bool:
    return int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1


def _checked(index: Any, count: Any) -> tuple[int, int]:
    try:
        count, index = int(count), int(index)
    except ValueError:
        raise UserError(f"{count!r} processes of which this is {index!r}: not numbers") from None
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be from 0 to {count - 1}, one each process")
    return index, count


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, `jax.process_count()` processes work together; must come before JAX is used.

    A process that fails ends at once, so that the others are not kept waiting for it; a mistake
    that all of them notice is told by one.
    """
    known = find(flags.FLAGS.flag_values_dict(), os.environ)
    if known is None:
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT.value,
            # The last to finish may have a large model to write.
            shutdown_timeout_seconds=ANSWER_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"joining the other processes failed: {first_line(error)}") from error
    try:
        yield
    except UserError as error:
        _leave(f"error: {first_line(error)}", 2)
    except Exception as error:
        traceback.print_exc()
        _leave(f"error: {first_line(error)}", 1)


def _leave(message: str, status: int) -> NoReturn:
    """Ends this process; prints the message if it is the first that fails."""
    client = _client()
    with contextlib.suppress(RuntimeError):
        if client.key_value_increment("seed_jax/failures", 1) == 1:
            where = (
                f"{socket.gethostname()}, process {jax.process_index()} of {jax.process_count()}"
            )
            print(f"{message} ({where})", file=sys.stderr)
        client.key_value_set(f"seed_jax/gather/{next(_rounds)}/{jax.process_index()}", FAILED)
        client.wait_at_barrier("seed_jax/failed", FAILURE_SECONDS * 1000)
        if is_first():
            time.sleep(1)  # the others talk through this process until they are gone
    sys.stdout.flush()
    sys.stderr.flush()
    # Past the shutdown of JAX, which would wait for those that go on.
    os._exit(status)


def gather(text: str) -> list[str]:
    """What each process passed here, in their order; all of them must call it.

    Ends this process if another one has failed instead.
    """
    client = _client()
    if client is None:
        return [text]
    # By the coordinator and not by devices, so that it works whatever these are busy with.
    number, own = next(_rounds), jax.process_index()
    folder = f"seed_jax/gather/{number}"
    client.key_value_set(f"{folder}/{own}", SAID + text)
    said = [
        client.blocking_key_value_get(f"{folder}/{index}", ANSWER_SECONDS * 1000)
        for index in range(jax.process_count())
    ]
    if FAILED in said:
        _leave("error: another process failed", 2)
    # All are in this round, and so have read what was said in the one before.
    if number:
        client.key_value_delete(f"seed_jax/gather/{number - 1}/{own}")
    return [text.removeprefix(SAID) for text in said]


def agree(text: str) -> None:
    """Waits for all processes, and makes sure that all say the same.

    Comes before they compute together, where one could wait for ever for another that failed.

    Raises:
      UserError: they don't.
    """
    said = gather(text)
    for index, other in enumerate(said):
        if other != said[0]:
            raise UserError(f"process 0 found {said[0]}, but process {index} found {other}")


def is_first() -> bool:
    """Whether this is the process that writes for all."""
    return jax.process_index() == 0


def mistake_is_mine_to_tell() -> bool:
    """Before processes are joined: whether this is the one that tells of a wrong command line."""
    known = find({}, os.environ)
    return not known or known["process_id"] == 0


def _client() -> Any:
    # JAX has no public name for it; orbax uses the same.
    return distributed.global_state.client
