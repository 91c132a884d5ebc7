"""FID against torch-fidelity: the network, and the distance. The suites: `test_reconstruction`."""

import numpy as np
import pytest
import torch

from seed_jax.cli import UserError
from seed_jax.evaluation import fid
from tests import reference_fid


def test_the_network_sees_what_torch_fidelitys_sees(tmp_path):
    file = tmp_path / "inception.pth"
    network = reference_fid.save_inception(file)
    # Neither square nor as many as there are devices.
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3)).astype(np.uint8)
    expected = reference_fid.features(network, pictures)
    assert expected.std() > 0.1
    np.testing.assert_allclose(fid.open_inception(file)(pictures), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("pictures", "tolerance"), [((200, 150), 1e-9), ((30, 20), 1e-5)])
def test_the_distance_is_torch_fidelitys(pictures, tolerance):
    # More pictures than features, and fewer, where torch-fidelity takes roots of rounding errors.
    rng = np.random.default_rng(0)
    mix_FF = rng.normal(size=(64, 64))
    a_PF = rng.normal(size=(pictures[0], 64))
    b_PF = 0.3 + 1.2 * rng.normal(size=(pictures[1], 64)) @ mix_FF
    expected = reference_fid.distance(a_PF, b_PF)
    assert fid.distance(a_PF, b_PF) == pytest.approx(expected, rel=tolerance)
    assert fid.distance(a_PF, a_PF) == pytest.approx(0, abs=1e-9)


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="FID of 1 pictures: it takes two or more"):
        fid.distance(np.zeros((1, 8)), np.zeros((3, 8)))

    def refused(message: str, name: str, weights: dict) -> None:
        torch.save(weights, tmp_path / name)
        with pytest.raises(UserError, match=message) as error:
            fid.open_inception(tmp_path / name)
        assert "\n" not in str(error.value)

    vgg = {"features.0.weight": torch.zeros(64, 3, 3, 3)}
    refused("does not fit the Inception of the FID: missing: ", "vgg16.pth", vgg)
    refused("SHA-256 .* not 6726825d", "pt_inception-2015-12-05-6726825d.pth", vgg)


def test_few_pictures_are_told():
    assert "far too high" in fid.caution(2048)
    assert "Of fewer than 10000 it is too high" in fid.caution(2049)
    assert fid.caution(10_000) == "FID of 10000 pictures."
