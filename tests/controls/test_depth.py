"""Depth by networks of transformers and by the estimator of the built-in world."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import numpy as np
import pytest
from hub_server import running_hub
from PIL import Image
from tiny_controls import save_depth, save_estimator, save_segmentation
from transformers import AutoImageProcessor, AutoModelForDepthEstimation
from transformers.utils import is_torchvision_available

from scaleweaver.controls import Depth, depth
from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.controls.networks import choose_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_depth(tmp_path_factory.mktemp("depth") / "network")


def noise(height: int = 47, width: int = 61) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_near_is_bright_over_the_full_range(folder: Path) -> None:
    made = np.asarray(Depth(str(folder))(noise()))
    assert (made == made[..., :1]).all() and made.min() == 0 and made.max() == 255
    inputs = AutoImageProcessor.from_pretrained(folder)(images=Image.fromarray(noise()), return_tensors="pt")
    said = AutoModelForDepthEstimation.from_pretrained(folder).eval()(**inputs).predicted_depth[0].detach().numpy()
    shrunk = np.asarray(Image.fromarray(made[..., 0]).resize(said.shape[::-1]), float)
    assert np.corrcoef(shrunk.ravel(), said.ravel())[0, 1] > 0.9  # larger numbers of the network are nearer


def test_networks_that_give_distances_are_inverted(folder: Path, tmp_path: Path) -> None:
    def brighter_where_brighter(values: np.ndarray, others: np.ndarray) -> bool:
        return bool(others[values >= np.quantile(values, 0.8)].mean() > others[values <= np.median(values)].mean())

    values = Depth(str(folder)).values(noise())
    assert not brighter_where_brighter(values, Depth(str(folder), metric=True).values(noise()))
    by_config = str(save_depth(tmp_path / "metric", metric=True))
    inverted, plain = Depth(by_config).values(noise()), Depth(by_config, metric=False).values(noise())
    assert not brighter_where_brighter(plain, inverted)
    assert np.array_equal(inverted, Depth(by_config, metric=True).values(noise()))


def test_sixteen_bits(folder: Path, tmp_path: Path) -> None:
    detect = Depth(str(folder), detect_resolution=40)
    deep = detect.sixteen_bit(noise(80, 100))
    assert deep.mode == "I;16" and deep.size == (100, 80)
    deep.save(tmp_path / "depth.png")
    levels = np.asarray(Image.open(tmp_path / "depth.png"))
    assert levels.dtype == np.uint16 and len(np.unique(levels)) > 1000
    assert np.abs(levels / 65535 - np.asarray(detect(noise(80, 100)))[..., 0] / 255).mean() < 0.005
    assert levels.min() < 2000 and levels.max() > 63000


def test_a_flat_answer_is_black(folder: Path) -> None:
    detect = Depth(str(folder))
    network: Any = detect.network
    network.network.head.conv3.weight.data.zero_()
    assert not np.asarray(detect(noise())).any()


def test_the_network_is_loaded_once_and_forgotten(folder: Path) -> None:
    detect = Depth(str(folder))
    assert "network" not in vars(detect)
    first, network = np.asarray(detect(noise())), detect.network
    detect(noise())
    assert detect.network is network
    weights = weakref.ref(network.network)
    del network
    detect.unload()
    gc.collect()
    assert "network" not in vars(detect) and weights() is None  # their memory is free
    assert np.array_equal(np.asarray(detect(noise())), first)


def test_an_estimator_of_the_built_in_world(tmp_path: Path) -> None:
    folder = save_estimator(tmp_path)
    estimator = ToyboxEstimator.from_pretrained(folder).eval()
    expected = np.round(estimator.depth(noise()) * 255)
    assert np.array_equal(np.asarray(depth(noise(), str(folder)))[..., 0], expected)
    assert np.array_equal(np.asarray(Depth(str(folder), device="cpu")(noise()))[..., 0], expected)


def test_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_hub() as hub:
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(hub_constants, name, value)
        hub.create("me/depth")
        hub.commit("me/depth", {file.name: file.read_bytes() for file in folder.iterdir()}, "files")
        expected = np.asarray(Depth(str(folder))(noise()))
        assert np.array_equal(np.asarray(Depth("me/depth")(noise())), expected)
        with pytest.raises(ValueError, match=r"me/nothing.* neither built in \(toybox\).*without the Hub"):
            Depth("me/nothing")(noise())
    # from now on the cache does
    assert np.array_equal(np.asarray(Depth("me/depth")(noise())), expected)


def test_without_a_connection() -> None:
    with pytest.raises(OSError, match=r'Depth-Anything-V2-Small-hf.*Hub.*check the connection.*model="toybox"'):
        depth(noise())
    with pytest.raises(ValueError, match=r'no/such/folder.*check the path.*model="toybox"'):
        Depth("no/such/folder")(noise())


def test_folders_that_are_no_depth_network(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json \(found: notes\.txt\)"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "notes.txt").write_text("")
        Depth(str(tmp_path / "empty"))(noise())
    with pytest.raises(ValueError, match=r"cannot be loaded for DepthEstimation .*weights as safetensors"):
        Depth(str(save_segmentation(tmp_path / "classes")))(noise())
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (truncated / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match=r"cannot be loaded for DepthEstimation .*safetensors"):
        Depth(str(truncated))(noise())
    (truncated / "config.json").write_text(json.dumps({})[:1])
    with pytest.raises(ValueError, match="damaged or truncated"):
        Depth(str(truncated))(noise())


def test_a_picture_too_long_for_the_network(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read a picture of 900x9 .* less long"):
        Depth(str(folder))(noise(9, 900))


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda", "mps")
    for wrong in ("gpu", None):
        with pytest.raises(ValueError, match=f"device={wrong!r}; pass auto, cpu, cuda"):
            choose_device(wrong)
    with pytest.raises(ValueError, match="device='cuda:99' is not on this machine; pass auto or cpu"):
        choose_device("cuda:99")


def test_the_device_is_looked_at_before_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match="device='cuda:99' is not on this machine"):
        Depth(str(tmp_path), device="cuda:99")(noise())


def test_a_family_that_needs_torchvision(folder: Path, tmp_path: Path) -> None:
    if is_torchvision_available():
        pytest.skip("torchvision is here")
    (tmp_path / "config.json").write_text('{"model_type": "zoedepth"}')
    with pytest.raises(ValueError, match="is a ZoeDepth, which transformers reads with torchvision alone"):
        Depth(str(tmp_path))(noise())
