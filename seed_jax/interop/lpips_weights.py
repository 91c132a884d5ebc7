"""LPIPS' weights as published: torchvision's AlexNet or VGG16, and the authors' file of heads."""

from pathlib import Path

from flax import nnx

from seed_jax import model_dir
from seed_jax.cli import UserError
from seed_jax.interop import state_dict
from seed_jax.interop.diffusers_weights import CONVOLUTION
from seed_jax.interop.state_dict import SAME, Layout, Row, Table
from seed_jax.interop.torch_io import check_named_hash, read_weights
from seed_jax.models.lpips import ALEX, LPIPS, VGG

FIRST = "features.0.weight"
# Of the first convolution.
TRUNKS = {(64, 3, 11, 11): ALEX, (64, 3, 3, 3): VGG}
# [C] <-> a convolution [1, C, 1, 1].
HEAD = Layout(lambda s: (1, *s, 1, 1))
IGNORED = ("classifier.*",)


def load(trunk: Path, heads: Path) -> LPIPS:
    """LPIPS with the weights of two files, of which no code is run.

    Args:
      trunk: 'alexnet-owt-7be5be79.pth' or 'vgg16-397923af.pth' of torchvision.
      heads: 'alex.pth' or 'vgg.pth' of the authors' version 0.1.

    Raises:
      UserError: `trunk` is neither of the two, or see `check_named_hash`, `read_weights` and
        `state_dict.load_state`.
    """
    check_named_hash(trunk)
    weights = read_weights(trunk)
    shape = tuple(weights[FIRST].shape) if FIRST in weights else ()
    if shape not in TRUNKS:
        raise UserError(f"{trunk} is neither torchvision's AlexNet nor its VGG16")
    module = LPIPS(TRUNKS[shape], rngs=nnx.Rngs(0))
    paths = model_dir.flat_params(nnx.state(module))
    table = Table("LPIPS", tuple(map(_row, paths)), ignored=IGNORED)
    source = f"{trunk} with {heads}"
    return state_dict.load(weights | read_weights(heads), table, module, source=source)


def _row(path: str) -> Row:
    """'convs/3/kernel' <-> 'features.3.weight', 'heads/0' <-> 'lin0.model.1.weight'."""
    part, number, *leaf = path.split("/")
    if part == "heads":
        return Row(f"lin{number}.model.1.weight", (path,), HEAD)
    if leaf == ["kernel"]:
        return Row(f"features.{number}.weight", (path,), CONVOLUTION)
    return Row(f"features.{number}.bias", (path,), SAME)
