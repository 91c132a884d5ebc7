"""LPIPS against the authors' own package, which takes its networks from torchvision."""

import importlib
import types

import numpy as np
import pytest
import torch
from torch import nn

from seed_jax.cli import UserError
from seed_jax.evaluation import perceptual
from tests import reference_fid


def alexnet() -> nn.Sequential:
    """As torchvision's `features`."""
    sizes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1)]
    sizes += [(384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    layers = []
    for number, size in enumerate(sizes):
        layers += [nn.Conv2d(*size), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if number in (0, 1, 4) else []
    return nn.Sequential(*layers)


def vgg16() -> nn.Sequential:
    """As torchvision's `features`."""
    layers, width = [], 3
    for depth, wider in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(depth):
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
            width = wider
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def published(folder, name: str):
    """The authors' LPIPS with random weights, and the two files that it would be published in."""
    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(
        alexnet=lambda pretrained: types.SimpleNamespace(features=alexnet()),
        vgg16=lambda pretrained: types.SimpleNamespace(features=vgg16()),
    )
    with reference_fid.standing_in({"torchvision": torchvision}), torch.random.fork_rng():
        torch.manual_seed(0)
        # The heads are the authors', which their package brings along.
        model = importlib.import_module("lpips").LPIPS(net=name, pnet_rand=True, verbose=False)
    slices = [getattr(model.net, f"slice{number}") for number in range(1, 6)]
    features = {
        f"features.{place}.{key}": value
        for part in slices
        for place, layer in part.named_children()
        for key, value in layer.state_dict().items()
    }
    heads = {f"lin{i}.model.1.weight": lin.model[1].weight for i, lin in enumerate(model.lins)}
    torch.save(features | {"classifier.1.weight": torch.zeros(3)}, folder / "trunk.pth")
    torch.save(heads, folder / "heads.pth")
    return model, folder / "trunk.pth", folder / "heads.pth"


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_distances_are_the_authors(name, tmp_path):
    model, *files = published(tmp_path, name)
    a, b = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3)).astype(np.uint8)
    with torch.no_grad():
        expected = model(
            *(torch.from_numpy(x.transpose(0, 3, 1, 2) / 127.5 - 1).float() for x in (a, b))
        )[:, 0, 0, 0].numpy()
    lpips = perceptual.open_lpips(*files)
    assert (expected > 0.01).all()
    np.testing.assert_allclose(lpips(a, b), expected, rtol=1e-4)
    np.testing.assert_array_equal(lpips(a, a), np.zeros(3))
    with pytest.raises(UserError, match=r"LPIPS of pictures of 31 pixels: .* take 32 or more"):
        lpips(a[:, :31, :31], b[:, :31, :31])


def test_what_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "heads.pth")

    def refused(message: str, trunk: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            perceptual.open_lpips(tmp_path / trunk, tmp_path / "heads.pth")
        assert "\n" not in str(error.value)

    refused("resnet.pth is neither torchvision's AlexNet nor its VGG16", "resnet.pth")
    refused("vgg.pth with .*heads.pth does not fit LPIPS: missing: ", "vgg.pth")
