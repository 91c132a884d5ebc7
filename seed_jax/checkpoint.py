"""Checkpoints of a run: training state and data iterator together, by orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints under WORKDIR/checkpoints; saving is asynchronous and atomic."""

    def __init__(self, folder: Path, *, keep: int):
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            item_names=("state", "data"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Saves unless this step is there already.

        Args:
          state: pytree of arrays, sharded or not.
          data: the data iterator's state as of the batch after this step; JSON-able.
        """
        if self.latest == step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_by_path(state)), data=ocp.args.JsonSave(data)
            ),
        )

    def restore(self, step: int, state: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The state, like `state` and split by `shardings`, and the data iterator's state."""
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_by_path(target)), data=ocp.args.JsonRestore()
            ),
        )
        leaves = [restored.state[name] for name in _by_path(target)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), restored.data

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.close()


def _by_path(tree: Any) -> dict[str, Any]:
    # Flat names survive changes of container types, and read well in orbax's own tools.
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
