"""What frozen parts made of each record of the training set, so that they need not run each step.

For small sets: every record is kept, of the one view and caption that it was run with.
"""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from seed_jax import sharding
from seed_jax.data import mixture
from seed_jax.models.layers import Array, M
from seed_jax.tasks import Batch


class Remembered(nnx.Variable):
    """Outputs by the record's index, [N, ...] for N records."""


class Memory(nnx.Module):
    """Tables of outputs by name, empty until `fill`.

    Args:
      data: the training set, as in the configs.
      outputs: name -> shape and dtype of what is kept of a record.
    """

    def __init__(self, data: ConfigDict, outputs: Mapping[str, jax.ShapeDtypeStruct]):
        source = mixture.open_training_set(data)
        self._rows = mixture.rows_of_a_pass(source)
        self.tables = nnx.Dict(
            {
                name: Remembered(jnp.zeros((len(source), *kept.shape), kept.dtype))
                for name, kept in outputs.items()
            }
        )

    def lookup(self, index_B: Array) -> dict[str, Array]:
        """What was kept of these records, [B, ...] a name."""
        return {name: table[...][index_B] for name, table in self.tables.items()}

    def fill(
        self,
        frozen: M,
        run: Callable[[M, Batch], dict[str, Array]],
        batches: Iterator[Batch],
        batch_size: int,
    ) -> None:
        """One pass over the set, with the views and captions that it draws.

        Where sets are mixed with weights, those that come round more often are run as often, and
        what is kept is of the last time.

        Args:
          run: (frozen, batch) -> name -> [B, ...]; compiled here.
        """
        graphdef, state = nnx.split(frozen)
        compiled = jax.jit(lambda state, batch: run(nnx.merge(graphdef, state), batch))
        filled = {name: np.zeros(table.shape, table.dtype) for name, table in self.tables.items()}
        for _ in range(-(-self._rows // batch_size)):
            batch = next(batches)
            index_B = sharding.on_host(batch["index"])
            for name, rows in sharding.on_host(compiled(state, batch)).items():
                filled[name][index_B] = rows
        for name, table in self.tables.items():
            table[...] = jax.device_put(filled[name], table[...].sharding)


def recall(
    memory: Memory | None,
    frozen: M,
    run: Callable[[M, Batch], dict[str, Array]],
    batch: Batch,
) -> dict[str, Array]:
    """What the frozen parts make of a batch: from memory, or run where there is none."""
    return run(frozen, batch) if memory is None else memory.lookup(batch["index"])
