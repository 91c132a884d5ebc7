"""Checkpoints of a run: training state and data iterator together, by orbax."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from seed_jax import files, hosts
from seed_jax.cli import UserError, first_line

SIZES = "sizes.json"
HALF_WRITTEN = "*.orbax-checkpoint-tmp*"
TRIES = 50


class Restored(NamedTuple):
    """A checkpoint's content: after which step, the training state, each host's data iterator."""

    step: int
    state: Any
    data: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints under WORKDIR/checkpoints; saving is asynchronous and atomic.

    With several processes, all of them call each method.
    """

    def __init__(self, folder: Path, *, keep: int):
        """`keep` of them stay: the newest ones."""
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=("state", "data"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                create=True,
                # What a kill left half-written; nobody else writes here.
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._note_sizes),
            ),
        )

    def _note_sizes(self) -> None:
        """Lists the files of the checkpoint that is about to get its name."""
        if hosts.is_first():
            for folder in self._folder.glob(HALF_WRITTEN):
                sizes = files.file_sizes(folder)
                del sizes["_CHECKPOINT_METADATA"]  # orbax goes on writing there
                (folder / SIZES).write_text(json.dumps(sizes))

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Saves unless this step is there already.

        Args:
          state: pytree of arrays, sharded or not.
          data: this host's data iterator's state as of the batch after this step; JSON-able.
        """
        if self._manager.latest_step() == step:
            return
        states = [json.loads(text) for text in hosts.gather(json.dumps(data))]
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_by_path(state)),
                data=ocp.args.JsonSave({"hosts": states}),
            ),
        )

    def restore(self, state: Any, shardings: Any) -> Restored | None:
        """The newest checkpoint that can be read, its state like `state` and split by `shardings`.

        Those that can't are moved out of the way, to WORKDIR/damaged_checkpoint_STEP.

        Returns:
          None if there are no checkpoints.

        Raises:
          UserError: there are some, but none can be read, or the devices have no room for it.
        """
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
        )
        # The first host's listing counts: a shared file system may show the others an older one.
        listing = hosts.gather(json.dumps(sorted(self._manager.all_steps(), reverse=True)))
        damaged: dict[int, str] = {}
        for step in json.loads(listing[0]):
            try:
                found, problem = self._read(step, target), ""
            except Exception as error:  # what damaged files make orbax raise has no common base
                problem = first_line(error)
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise UserError(
                        f"{self._folder / str(step)} needs more memory than the devices have "
                        f"({problem}); take more of them, or more of config.mesh.fsdp"
                    ) from error
            # A host reads its own part, and all have to go on from the same step.
            problem = next(filter(None, hosts.gather(problem)), "")
            if not problem:
                self._set_aside(damaged)
                return found
            damaged[step] = problem
        if damaged:
            step, problem = next(iter(damaged.items()))
            raise UserError(
                f"{self._folder}: no checkpoint can be read ({step}: {problem}); "
                "move the folder away to begin anew"
            )
        return None

    def _read(self, step: int, target: Any) -> Restored:
        folder = self._folder / str(step)
        for problem in files.wrong_sizes(folder, json.loads((folder / SIZES).read_text())):
            raise ValueError(problem)
        # By handlers, which wait for no other process: this one may fail where others don't.
        data = ocp.JsonCheckpointHandler().restore(folder / "data", ocp.args.JsonRestore())
        flat = ocp.StandardCheckpointHandler().restore(
            folder / "state", args=ocp.args.StandardRestore(_by_path(target))
        )
        leaves = [flat[name] for name in _by_path(target)]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(target), leaves), data["hosts"])

    def _set_aside(self, damaged: dict[int, str]) -> None:
        if not damaged:
            return
        if hosts.is_first():
            for step, problem in damaged.items():
                aside = self._folder.with_name(f"damaged_checkpoint_{step}")
                print(
                    f"warning: checkpoint {step} can't be read ({problem}); it is now {aside}, and "
                    "the one before it is used",
                    file=sys.stderr,
                )
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / str(step)).rename(aside)
        hosts.gather("moved")
        self._manager.reload()

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.close()


def give_back_room(folder: Path) -> int | None:
    """Takes away what there is of an unfinished checkpoint; the step of the newest whole one."""
    for half in list(folder.glob(HALF_WRITTEN)):
        # What orbax was still writing when it gave up may come in between.
        for _ in range(TRIES):
            shutil.rmtree(half, ignore_errors=True)
            if not half.exists():
                break
            time.sleep(0.1)
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=None)


def _by_path(tree: Any) -> dict[str, Any]:
    # Flat names survive changes of container types, and read well in orbax's own tools.
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
