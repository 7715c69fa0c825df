"""What the page may be asked for."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import edges, tiny_pipeline

from scaleweaver.contracts import Control
from scaleweaver.control_maps import detector_of, map_of_photo
from scaleweaver.controls.openpose import from_json
from scaleweaver.demo.control_slot import examples
from scaleweaver.demo.drawing import Drawn, Wish
from scaleweaver.demo.encoded import data_url, decode
from scaleweaver.demo.studio import Limits, Studio
from scaleweaver.demo.widgets.skeleton import poses
from scaleweaver.pipeline import VARControlPipeline

WISH = Wish("a red cube on grass", seed=1)


@pytest.fixture(scope="module")
def tiny() -> Studio:
    return Studio(tiny_pipeline("canny"), Limits(prompt=30, pictures=2, controls=1, megapixels=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "x" * 31}, "31 characters; write at most 30"),
        ({"count": 3}, "3 pictures were asked for; ask for 1 to 2"),
        ({"controls": (Control("canny", edges()),) * 2}, "2 controls were given; use at most 1"),
        ({"options": {"negative_prompt": "x" * 31}}, "negative prompt has 31 characters; write at most 30"),
    ],
)
def test_limits(tiny: Studio, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        next(tiny.draw(replace(WISH, **change)))
    assert isinstance(list(tiny.draw(WISH))[-1], Drawn)


def test_uploads_are_looked_at_before_they_are_decoded(tiny: Studio, tmp_path: Path) -> None:
    large, broken = tmp_path / "large.png", tmp_path / "broken.png"
    Image.new("1", (1100, 1000)).save(large)
    Image.effect_noise((200, 200), 90).save(broken)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.tiff")
    broken.write_bytes(broken.read_bytes()[:9000])
    with pytest.raises(ValueError, match="1100x1000, more than 1 million pixels"):
        tiny.upload(str(large))
    with pytest.raises(ValueError, match="no picture that can be read"):
        tiny.upload(str(broken))
    with pytest.raises(ValueError, match="pass a PNG, JPEG or WebP"):
        tiny.upload(str(tmp_path / "other.tiff"))
    with pytest.raises(ValueError, match="there is no photo yet"):
        tiny.upload(None, "photo")


def test_pictures_as_text() -> None:
    picture = edges().convert("RGB")
    assert np.array_equal(decode(data_url(picture), "map", most_pixels=2000), picture)
    with pytest.raises(ValueError, match=r"map is 32x32, more than 0\.001 million"):
        decode(data_url(picture), "map", most_pixels=1000)
    with pytest.raises(ValueError, match="not base64"):
        decode("*", "map", most_pixels=1000)
    with pytest.raises(ValueError, match="no picture that can be read"):
        decode("aGVsbG8=", "map", most_pixels=1000)


def test_only_what_the_model_draws_is_offered(tiny: Studio) -> None:
    assert tiny.sizes == {"32 x 32": (32, 32)}
    ratios = Studio(tiny_pipeline(schedule={"family": "infinity", "budget": "0.25M"})).sizes
    assert ratios["512 x 512"] == (512, 512) and ratios["256 x 256"] == (256, 256)
    assert len(ratios) == 30 and (1024, 1024) not in ratios.values()
    with pytest.raises(ValueError, match="'640 x 480' is no size of this model"):
        tiny.size("640 x 480")


def test_maps_are_those_of_the_training(studio: Studio) -> None:
    for example in examples(studio):
        photo = studio.upload(example.path)
        made = studio.map_of(example.kind, photo)
        assert np.array_equal(made, map_of_photo(photo, studio.pipe.controls[example.kind].config))
    with pytest.raises(ValueError, match="no control 'lineart'; choose canny, depth, palette, pose"):
        studio.map_of("lineart", photo)


def test_poses_are_found_and_drawn(studio: Studio) -> None:
    (wave,) = [example for example in examples(studio) if example.file == "wave.png"]
    record = studio.find_pose("pose", studio.upload(wave.path))
    points, size = from_json(json.loads(record))
    assert points.shape == (1, 18, 3) and size == (128, 128)
    assert points[0, 4, 1] < points[0, 2, 1]  # the right wrist is above its shoulder
    assert np.array_equal(studio.skeletons("pose", record), studio.map_of("pose", studio.upload(wave.path)))
    with pytest.raises(ValueError, match="nobody was found"):
        studio.find_pose("pose", Image.new("RGB", (128, 128), "white"))
    with pytest.raises(ValueError, match="canny reads no poses"):
        studio.find_pose("canny", Image.new("RGB", (128, 128)))


def test_a_pose_is_text_and_never_the_name_of_a_file(studio: Studio, tmp_path: Path) -> None:
    record = json.dumps(poses()["standing"])
    (tmp_path / "pose.json").write_text(record)
    assert studio.skeletons("pose", record).size == (128, 128)
    people = [poses()["standing"]["people"][0]]
    assert studio.skeletons("pose", json.dumps({**poses()["standing"], "people": people * 20})).size == (128, 128)
    for value, words in (
        ("/etc/hostname", "is not JSON"),
        (str(tmp_path / "pose.json"), "is not JSON"),
        (json.dumps(str(tmp_path / "pose.json")), "is a str; pass one object"),
        (json.dumps([str(tmp_path / "pose.json")]), "is a list; pass one object"),
        ({"people": []}, "no text of at most 1,000,000"),
        (record + " " * 1_000_000, "no text of at most 1,000,000"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps({"people": people * 21}), "has 21 people; keep at most 20"),
    ):
        with pytest.raises(ValueError, match=words):
            studio.skeletons("pose", value)  # type: ignore[arg-type]


def test_a_detector_is_made_once_for_all(toybox: VARControlPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    both = threading.Barrier(2, timeout=20)

    def slowly(config: Any) -> Any:
        made.append(config.kind)
        time.sleep(0.2)  # the other one comes meanwhile
        return detector_of(config)

    monkeypatch.setattr("scaleweaver.demo.studio.detector_of", slowly)
    studio, photo = Studio(toybox), Image.new("RGB", (128, 128), "red")

    def visit() -> None:
        both.wait()
        studio.map_of("depth", photo)

    visitors = [threading.Thread(target=visit) for _ in range(2)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(60)
    assert made == ["depth"]


def test_a_drawing_borrows_a_gpu_where_a_space_lends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[int] = []
    spaces = ModuleType("spaces")
    spaces.__spec__ = sys.__spec__

    def lend(duration: int) -> Any:
        def wrap(function: Any) -> Any:
            def run(*arguments: Any) -> Iterator[Any]:
                lent.append(duration)
                yield from function(*arguments)

            return run

        return wrap

    spaces.GPU = lend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    studio = Studio(tiny_pipeline(), Limits(gpu_seconds=40))
    assert isinstance(list(studio.draw(WISH))[-1], Drawn)
    assert lent == [40]
