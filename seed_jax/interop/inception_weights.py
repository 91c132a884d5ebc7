"""The FID's Inception as pytorch-fid and torch-fidelity publish it, one `.pth` file."""

from pathlib import Path

from flax import nnx

from seed_jax import model_dir
from seed_jax.interop import state_dict
from seed_jax.interop.diffusers_weights import CONVOLUTION
from seed_jax.interop.state_dict import SAME, Row, Table
from seed_jax.interop.torch_io import check_named_hash, read_weights
from seed_jax.models.inception import Inception

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Counters of training, and the layer that tells classes apart, which FID does without.
IGNORED = ("*.num_batches_tracked", "fc.*", "AuxLogits.*")


def load(file: Path) -> Inception:
    """The network with the weights of a file, of which no code is run.

    Raises:
      UserError: see `check_named_hash`, `read_weights` and `state_dict.load_state`.
    """
    check_named_hash(file)
    module = Inception(rngs=nnx.Rngs(0))
    paths = model_dir.flat_params(nnx.state(module))
    table = Table("the Inception of the FID", tuple(map(_row, paths)), ignored=IGNORED)
    return state_dict.load(read_weights(file), table, module, source=str(file))


def _row(path: str) -> Row:
    """'convs/Mixed_5b.branch1x1/conv/kernel' <-> 'Mixed_5b.branch1x1.conv.weight'."""
    _, name, part, leaf = path.split("/")
    layout = CONVOLUTION if leaf == "kernel" else SAME
    return Row(f"{name}.{part}.{LEAVES[leaf]}", (path,), layout)
