"""torch-fidelity's Inception, with random weights, and its FID.

The package imports torchvision for what is not used here; so it is entered by the back door.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextlib.contextmanager
def standing_in(modules: Mapping[str, Any]) -> Iterator[None]:
    """Has imports find these; what else is imported meanwhile stays."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def modules() -> tuple[Any, Any]:
    """Those of the network and of the distance."""
    spec = importlib.util.find_spec("torch_fidelity")
    package = types.ModuleType(spec.name)
    package.__path__ = list(spec.submodule_search_locations)
    entered = {package.__name__: package, f"{package.__name__}.utils": mock.MagicMock()}
    with standing_in(entered):
        names = ("feature_extractor_inceptionv3", "metric_fid")
        network, metric = (importlib.import_module(f"{package.__name__}.{name}") for name in names)
    return network, metric


def save_inception(file: Path) -> Any:
    """Writes its state dict as published ones are; returns the network."""
    kind = modules()[0].FeatureExtractorInceptionV3
    init = kind.__init__.__globals__
    with (
        mock.patch.dict(init, load_state_dict_from_url=lambda *a, **k: {}),
        mock.patch.object(kind, "load_state_dict"),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        network = kind("inception", ["2048"])
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean, std=0.1)
                torch.nn.init.uniform_(module.running_var, 0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, std=0.1)
    torch.save(network.state_dict(), file)
    return network


def features(network: Any, pictures_BHW3: np.ndarray) -> np.ndarray:
    """Of uint8 pictures, [B, 2048]."""
    pictures = torch.from_numpy(pictures_BHW3.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return network(pictures)[0].numpy()


def distance(a_PF: np.ndarray, b_PF: np.ndarray) -> float:
    """FID."""
    metric = modules()[1]
    statistics = [metric.fid_features_to_statistics(torch.from_numpy(x)) for x in (a_PF, b_PF)]
    return metric.fid_statistics_to_metric(*statistics, False)[metric.KEY_METRIC_FID]
