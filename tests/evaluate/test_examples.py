"""Evaluation sets: the built-in world with its exact maps, and folders of pictures with captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaleweaver.evaluate.examples import FolderExamples, ToyboxExamples, captions, meter_of, partner
from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.toybox.scene import Person, sample_scene


def test_the_world_gives_exact_maps_and_what_they_were_drawn_from():
    data = ToyboxExamples("test", ("canny", "depth", "pose"), size=32, people=False)
    example, batch = data.read([5])[0], draw_batch("test", [5], size=32)
    assert np.array_equal(example.reference, batch.pixels[0])
    assert example.prompt == explicit_caption(batch.scenes[0]) and example.asked["count"] == len(batch.scenes[0].items)
    assert np.array_equal(example.maps["depth"][..., 2], example.targets["depth"])
    assert example.targets["depth"].max() == 255 and np.array_equal(example.targets["pose"], batch.keypoints[0])
    assert {name: made.shape for name, made in example.maps.items()} == dict.fromkeys(
        ("canny", "depth", "pose"), (32, 32, 3)
    )
    assert data.settings["maps"]["depth"] == "exact" and "low=100" in data.settings["maps"]["canny"]


def test_for_poses_only_scenes_with_people_count():
    data = ToyboxExamples("test", ("pose",), size=32)
    indices = [data.index(number) for number in range(5)]
    there = [i for i in range(indices[-1] + 1) if any(isinstance(x, Person) for x in sample_scene("test", i).items)]
    assert indices == there and all(len(example.targets["pose"]) for example in data.read(range(2)))
    assert data.settings["people"] and not ToyboxExamples("test", ("pose", "canny")).people


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="depth of the built-in world is exact and takes no settings"):
        ToyboxExamples("test", ("depth",), detectors={"depth": {"model": "x"}})
    with pytest.raises(ValueError, match="no preprocessor makes 'magic' maps"):
        ToyboxExamples("test", ("magic",))
    with pytest.raises(ValueError, match="split is 'nothing'"):
        ToyboxExamples("nothing")


def test_partners():
    assert [partner(number, None) for number in range(4)] == [1, 0, 3, 2]
    assert [partner(number, 3) for number in range(3)] == [1, 0, 1] and partner(0, 1) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three renders; the captions differ between the two ways of writing them."""
    for number, picture in enumerate(draw_batch("test", range(3), size=48).pixels):
        Image.fromarray(picture[:40]).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f" scene {number}\n")
    return tmp_path


def test_pictures_with_text_files_or_metadata(folder: Path):
    assert [(file.name, text) for file, text in captions(folder)] == [
        ("0.png", "scene 0"), ("1.png", "scene 1"), ("2.png", "scene 2"),
    ]  # fmt: skip
    lines = [{"file_name": "2.png", "text": "two"}, {"file_name": "0.png", "text": "none"}, {"file_name": "1.png"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(file.name, text) for file, text in captions(folder)] == [("2.png", "two"), ("0.png", "none")]
    data = FolderExamples(folder, ("canny", "palette"), height=32, width=32, detectors={"palette": {"cells": 4}})
    example = data.read([1])[0]
    assert example.prompt == "none" and example.reference.shape == example.maps["canny"].shape == (32, 32, 3)
    assert example.asked is None and data.limit == 2 and "cells=4" in data.settings["maps"]["palette"]
    assert len(np.unique(example.maps["palette"].reshape(-1, 3), axis=0)) <= 16


def test_captions_as_training_reads_them(folder: Path):
    """Several wordings, other names of the column, separators inside of a line; none at all."""
    (folder / "0.txt").write_text("\n first \nsecond\n")
    (folder / "1.txt").write_text(" \n")
    assert [(file.name, text) for file, text in captions(folder)] == [("0.png", "first"), ("2.png", "scene 2")]
    lines = [{"file_name": "0.png", "caption": "one\u2028line"}, {"file_name": "1.png", "captions": ["a", "b"]},
             {"file_name": "2.png", "text": ""}]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert [(file.name, text) for file, text in captions(folder)] == [("0.png", "one\u2028line"), ("1.png", "a")]
    for wrong in ('{"text": "x"}\n', "[1]\n", "no json\n"):
        (folder / "metadata.jsonl").write_text(text + wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=r"metadata\.jsonl, line 4 is no JSON object with a file_name"):
            captions(folder)


@pytest.mark.parametrize("kind", ["canny", "palette", "grey"])
def test_maps_are_found_again_in_the_pictures_they_came_from(folder: Path, kind: str):
    data = FolderExamples(folder, (kind,), height=32, width=32)
    meter, examples = meter_of(kind, data), data.read(range(3))
    pictures = np.stack([example.reference for example in examples])
    summary = meter.summarise([[one] for one in meter.measure(pictures, [e.targets[kind] for e in examples])])
    assert summary[meter.main] == (1.0 if kind == "canny" else 0.0)


def test_the_set_notices_that_it_changed(folder: Path):
    before = FolderExamples(folder, height=32, width=32).settings
    assert FolderExamples(folder, height=32, width=32).settings == before
    (folder / "0.txt").write_text("another")
    assert FolderExamples(folder, height=32, width=32).settings["pictures"] != before["pictures"]


def test_folders_without_pictures(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no folder"):
        captions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no picture with a caption"):
        captions(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.png", "text": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"lacks 1 pictures that its metadata names: gone\.png"):
        captions(tmp_path)
