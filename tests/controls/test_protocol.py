"""What holds for every kind of control map, whatever makes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_controls import save_depth, save_pose, save_segmentation

from scaleweaver import controls
from scaleweaver.controls import KINDS, Canny, preprocessor
from scaleweaver.controls.base import Preprocessor, at_short_side
from scaleweaver.images import is_two_level

SIZE = (61, 47)


def scene(size: tuple[int, int] = SIZE) -> Image.Image:
    """A house before a gradient, sharp and coloured."""
    if min(size) < 16:
        return scene().resize(size)
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([rows * 99 // height, columns * 99 // width, 120 + 0 * rows], axis=2).astype(np.uint8)
    image = Image.fromarray(values)
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 4, height // 2, 3 * width // 4, height - 4), fill=(230, 200, 60))
    draw.polygon([(width // 5, height // 2), (width // 2, height // 8), (4 * width // 5, height // 2)], fill="darkred")
    return image


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What kinds with a network are given: a random one of toy size."""
    folder = tmp_path_factory.mktemp("networks")
    depth = {"model": str(save_depth(folder / "depth")), "device": "cpu"}
    pose, people = save_pose(folder)
    return {
        "depth": depth,
        "normals": depth,
        "segmentation": {"model": str(save_segmentation(folder / "segmentation")), "device": "cpu"},
        "pose": {"model": pose, "detector": people, "threshold": 0.01, "device": "cpu"},
    }


def settings(kind: str, networks: dict[str, dict[str, Any]], size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """What this kind cannot do without."""
    return {"mask": Image.new("L", size, 0)} if kind == "inpaint" else networks.get(kind, {})


@pytest.fixture(params=KINDS)
def detect(request: pytest.FixtureRequest, networks: dict[str, dict[str, Any]]) -> Preprocessor:
    return preprocessor(request.param, **settings(request.param, networks))


def test_every_kind_of_input_gives_the_same_map(detect: Preprocessor, tmp_path: Path) -> None:
    image = scene()
    image.save(tmp_path / "scene.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = detect(image)
    assert expected.mode == "RGB" and expected.size == SIZE
    sources = [tmp_path / "scene.png", str(tmp_path / "scene.png"), array, array / 255.0, tensor, tensor.float() / 255]
    for source in (*sources, image):  # the picture itself once more: the same again
        assert np.array_equal(np.asarray(detect(source)), np.asarray(expected))
    assert np.array_equal(np.asarray(image), array)


def test_pictures_as_users_have_them(detect: Preprocessor) -> None:
    image = scene()
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    see_through = image.convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(SIZE))
    for picture in (see_through, deep, image.convert("L"), image.convert("P"), image.convert("1")):
        made = detect(picture)
        assert made.mode == "RGB" and made.size == SIZE
    # sixteen bits are no other picture than eight
    assert np.array_equal(np.asarray(detect(deep)), np.asarray(detect(image.convert("L"))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 1), (3, 2), (200, 31)])
def test_odd_sizes(kind: str, size: tuple[int, int], networks: dict[str, dict[str, Any]]) -> None:
    assert preprocessor(kind, **settings(kind, networks, size))(scene(size)).size == size


@pytest.mark.parametrize("kind", KINDS)
def test_detection_at_another_size(kind: str, networks: dict[str, dict[str, Any]]) -> None:
    image, small = scene((180, 120)), scene((180, 120)).resize((60, 40), Image.Resampling.LANCZOS)
    own = preprocessor(kind, **settings(kind, networks, image.size))
    detect = preprocessor(kind, detect_resolution=40, **settings(kind, networks, image.size))
    made = np.asarray(detect(image))
    assert made.shape == (120, 180, 3)
    if kind not in ("inpaint", "pose"):  # a mask of its own size, skeletons drawn at the picture's
        at_small = np.asarray(preprocessor(kind, **settings(kind, networks, small.size))(small))
        restored = np.asarray(
            Image.fromarray(at_small).resize(
                image.size,
                Image.Resampling.BICUBIC if detect.levels == "smooth" else Image.Resampling.NEAREST,
            )
        )
        assert np.abs(made.astype(int) - restored).max() <= 1
    if kind != "palette":  # whose cells are as many at any size
        assert not np.array_equal(made, np.asarray(own(image)))


@pytest.mark.parametrize("kind", ["canny", "scribble", "lines"])
@pytest.mark.parametrize("detect_resolution", [None, 30, 200])
def test_two_levels_stay_two(kind: str, detect_resolution: int | None) -> None:
    detect = preprocessor(kind, detect_resolution=detect_resolution)
    made = detect(scene((90, 70)))
    assert detect.levels == "two-level"
    assert is_two_level(made) and len(np.unique(np.asarray(made))) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "512", 10**6])
def test_bad_detect_resolution(kind: str, value: Any, networks: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=rf"{kind} detect_resolution={value!r}; pass a whole number from 1 to 8192"):
        preprocessor(kind, detect_resolution=value, **settings(kind, networks))


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        ("palette", "cells", 0, "whole number from 1"),
        ("palette", "cells", 8.0, "whole number"),
        ("blur", "radius", -0.1, "from 0 to 0.5"),
        ("blur", "radius", float("nan"), "radius=nan"),
        ("tile", "factor", 0.5, "from 1 to 64"),
        ("softedge", "gain", "high", "gain='high'"),
        ("softedge", "model", "pidinet", "'classical' or 'hed'"),
        ("lineart", "contrast", 0, "contrast=0"),
        ("lineart", "width", None, "width=None"),
        ("scribble", "detail", 4, "detail=4"),
        ("scribble", "wobble", 1, "wobble=1"),
        ("lines", "shortest", -1, "shortest=-1"),
        ("normals", "relief", -1, "relief=-1"),
        ("normals", "model", "", "depth model=''"),
        ("depth", "model", None, "toybox"),
        ("depth", "metric", "yes", "metric='yes'"),
        ("segmentation", "model", 3, "model=3"),
    ],
)
def test_bad_settings(kind: str, name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preprocessor(kind, **{name: value})


def test_bad_pictures(detect: Preprocessor) -> None:
    with pytest.raises(ValueError, match=r"no file 'missing\.png'"):
        detect("missing.png")
    with pytest.raises(ValueError, match="NaN"):
        detect(np.full((4, 4), np.nan))


def test_the_registry() -> None:
    assert preprocessor("canny", low=50, detect_resolution=64) == Canny(low=50, detect_resolution=64)
    for kind in KINDS:
        made = preprocessor(kind, **settings(kind, {}))
        assert made.kind == kind
        assert type(made) is getattr(controls, type(made).__name__)  # what the package exports
        assert callable(getattr(controls, kind)) and type(made).__module__.endswith(f".{kind}")
    with pytest.raises(ValueError, match=r"no preprocessor makes 'sketch' maps; there is canny, .* inpaint"):
        preprocessor("sketch")
    with pytest.raises(ValueError, match="canny does not take radius; it can be given detect_resolution, low, high"):
        preprocessor("canny", radius=3)
    with pytest.raises(ValueError, match="inpaint needs mask"):
        preprocessor("inpaint")


def test_functions_do_what_the_usual_settings_do(networks: dict[str, dict[str, Any]]) -> None:
    image = scene()
    for kind in KINDS:
        chosen = settings(kind, networks)
        if kind == "pose":  # the function takes no detector of people
            continue
        arguments = [chosen[name] for name in ("model", "mask") if name in chosen]
        made = np.asarray(getattr(controls, kind)(image, *arguments))
        assert np.array_equal(made, np.asarray(preprocessor(kind, **chosen)(image))), kind


def test_the_package_loads_without_networks() -> None:
    code = (
        "import sys; from scaleweaver.controls import KINDS, blur, canny, depth, pose, preprocessor\n"
        "assert all(callable(f) for f in (blur, canny, depth, pose)), 'a module stands in the place of a function'\n"
        "preprocessor('depth'), preprocessor('segmentation'), preprocessor('pose')\n"
        "assert all(callable(f) for f in map(vars(sys.modules['scaleweaver.controls']).get, KINDS))\n"
        "print(*{'torch', 'transformers', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()


def test_at_short_side() -> None:
    assert at_short_side(Image.new("RGB", (300, 200)), 50).size == (75, 50)
    assert at_short_side(Image.new("RGB", (7, 90)), 20).size == (20, 257)
    with pytest.raises(ValueError, match="a picture of 2x90000 would be 512x23040000"):
        at_short_side(Image.new("RGB", (2, 90000)), 512)
