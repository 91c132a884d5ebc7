"""Files of PyTorch weights: whole ones are read, damaged and hostile ones are named and refused."""

import os
import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from seed_jax.cli import UserError
from seed_jax.interop.torch_io import read_weights


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save(tmp_path, wrapper, zipped):
    import torch

    tensors = {
        "half": torch.arange(6.0).reshape(2, 3).T.to(torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(4)),
        "scalar": torch.tensor(7),
    }
    data = tensors if wrapper is None else {wrapper: tensors, "epoch": 3}
    torch.save(data, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)

    weights = read_weights(tmp_path / "a.pth")

    assert weights.keys() == tensors.keys()
    half = np.asarray(weights["half"])
    assert half.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half.astype(np.float32), [[0, 3], [1, 4], [2, 5]])
    assert weights["half"].shape == (3, 2)
    np.testing.assert_array_equal(weights["parameter"], np.ones(4, np.float32))
    assert int(np.asarray(weights["scalar"])) == 7


def test_of_two_files_the_later_one_wins(tmp_path):
    import torch

    torch.save({"model": {"a": torch.zeros(2), "b": torch.zeros(2)}}, tmp_path / "first.pt")
    later = {"b": np.ones(3, np.float32)}
    safetensors.numpy.save_file(later, tmp_path / "second.safetensors")

    weights = read_weights([tmp_path / "first.pt", tmp_path / "second.safetensors"])

    assert {key: value.file.name for key, value in weights.items()} == {
        "a": "first.pt",
        "b": "second.safetensors",
    }
    np.testing.assert_array_equal(weights["b"], np.ones(3))


class Code:
    """What a hostile file holds: unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_tensor_can_be_read_again(tmp_path):
    import torch

    # Longer than a page of memory, which goes back to the system once it was read.
    values = torch.arange(50_000.0)
    torch.save({"whole": values, "part": values[5:20_005]}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    for _ in range(2):
        np.testing.assert_array_equal(weights["whole"], values.numpy())
        np.testing.assert_array_equal(weights["part"], values[5:20_005].numpy())


@pytest.mark.parametrize("how", ["torch", "torch, old format", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, how):
    import torch

    file, harm = tmp_path / "evil.pth", tmp_path / "harm"
    data = {"model": {"a": torch.zeros(2), "b": Code(harm)}}
    if how == "pickle":
        file.write_bytes(pickle.dumps({"b": Code(harm)}))
    else:
        torch.save(data, file, _use_new_zipfile_serialization=how == "torch")

    with pytest.raises(UserError, match=r"evil\.pth is refused: .*could run code") as error:
        read_weights(file)

    assert "\n" not in str(error.value)
    assert not harm.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "old.pth"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_named(tmp_path, suffix, kept):
    import torch

    file = tmp_path / f"part{suffix}"
    if suffix == ".safetensors":
        safetensors.numpy.save_file({"a": np.ones(1000, np.float32)}, file)
    else:
        new = suffix == ".pth"
        torch.save({"a": torch.ones(1000)}, file, _use_new_zipfile_serialization=new)
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])

    with pytest.raises(UserError, match=rf"part{suffix} is (damaged|refused)") as error:
        read_weights(file)

    assert "\n" not in str(error.value)


def test_other_files_are_named(tmp_path):
    import torch

    (tmp_path / "notes.txt").write_text("no weights")
    (tmp_path / "notes.pth").write_text("no weights")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(1), "step": 3}, tmp_path / "mixed.pth")
    for name, message in {
        "missing.pth": "is not a file",
        "notes.txt": r"is neither \.safetensors nor",
        "notes.pth": "is (damaged|refused)",
        "list.pth": "holds a list, not a state dict",
        "mixed.pth": "holds entries that are no tensors: step",
    }.items():
        with pytest.raises(UserError, match=f"{name} {message}"):
            read_weights(tmp_path / name)


def test_without_torch_only_its_own_files_are_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"")
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "a.safetensors")

    assert list(read_weights(tmp_path / "a.safetensors")) == ["a"]
    with pytest.raises(UserError, match=r"a\.pth is a PyTorch file, .*pip install torch"):
        read_weights(tmp_path / "a.pth")
