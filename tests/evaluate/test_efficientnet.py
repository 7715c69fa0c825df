"""EfficientNet-Lite0: padding, sizes, and the way from the published checkpoint to features. No network is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scaleweaver.evaluate.efficientnet import EfficientNetFeatures, EfficientNetLite0, SameConv, convert
from scaleweaver.evaluate.frechet import feature_extractor


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EfficientNetLite0().eval()


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "before", "after"),
    [(8, 3, 2, 0, 1), (7, 3, 2, 1, 1), (8, 5, 2, 1, 2), (8, 3, 1, 1, 1)],
)
def test_same_padding(side: int, kernel: int, stride: int, before: int, after: int) -> None:
    """The output has ceil(side / stride) pixels, and the odd pixel of padding lies at the end."""
    convolution = SameConv(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    plain = F.conv2d(F.pad(x, (before, after, before, after)), convolution.weight, stride=stride)
    assert torch.equal(convolution(x), plain) and plain.shape[-1] == -(-side // stride)


def test_size(network: EfficientNetLite0) -> None:
    """4.65M parameters with the classifier of 1000 classes, which is left out here."""
    assert sum(p.numel() for p in network.parameters()) == 4_652_008 - 1000 * 1281
    assert len(network.blocks) == 16 and network(torch.zeros(1, 3, 32, 32)).shape == (1, 1280)


def test_from_the_published_names_to_features(
    network: EfficientNetLite0, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tops = ("conv_stem", "bn0", "conv_head", "bn1")
    published = {
        f"_{key}"
        if key.startswith(tops)
        else "_blocks.{}._{}".format(*key.removeprefix("blocks.").split(".", 1)): value
        for key, value in network.state_dict().items()
    }
    assert "_blocks.1._expand_conv.weight" in published and "_bn0.running_var" in published
    torch.save(published | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}, tmp_path / "net.pth")
    convert([tmp_path / "net.pth"], tmp_path / "efficientnet-lite0.safetensors")
    monkeypatch.setenv("SCALEWEAVER_CACHE", str(tmp_path))  # it lies there already, so nothing is downloaded
    extractor = feature_extractor("efficientnet-lite0")
    assert isinstance(extractor, EfficientNetFeatures) and extractor.title == "FD-EffLite0"
    pictures = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    with torch.no_grad():
        expected = network((torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 127) / 128)
    np.testing.assert_allclose(extractor.features(pictures), expected.numpy(), atol=1e-4)


def test_unknown_features() -> None:
    with pytest.raises(ValueError, match=r'no features are called "inception"; pass judge or efficientnet-lite0'):
        feature_extractor("inception")
    with pytest.raises(ValueError, match="features of the judge need one"):
        feature_extractor("judge")
