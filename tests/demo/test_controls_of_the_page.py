"""Where a control of the page comes from: sketches, scenes, ready maps, masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_pipeline import tiny_pipeline

from scaleweaver.controls import palette
from scaleweaver.demo.control_slot import ControlSlot, examples, read_controls
from scaleweaver.demo.encoded import data_url
from scaleweaver.demo.knobs import size_choice
from scaleweaver.demo.scenes import find_scene, render_scene
from scaleweaver.demo.studio import Studio
from scaleweaver.demo.widgets.skeleton import poses
from scaleweaver.toybox import depth_map, draw_batch, draw_skeleton


@pytest.fixture(scope="module")
def slot(studio: Any) -> ControlSlot:
    with gradio.Blocks():
        return ControlSlot(studio, 1)


def made(slot: ControlSlot, source: str, kind: str, **given: Any) -> tuple[Any, str]:
    """(map, kind) after a source was used."""
    names = ("photo", "sketch", "skeleton", "ready", "scene")
    values = slot._from(source)(kind, slot.studio.own_size_name, *(given.get(name) for name in names))
    return values[0], values[2]


def sketch(paper: str, ink: str) -> str:
    drawn = Image.new("RGB", (512, 512), paper)
    ImageDraw.Draw(drawn).rectangle((100, 100, 400, 400), outline=ink, width=4)
    return data_url(drawn)


def test_a_sketch_of_lines_is_white_on_black_at_the_size_of_the_model(slot: ControlSlot) -> None:
    lines, _ = made(slot, "sketch", "canny", sketch=sketch("white", "black"))
    levels = np.asarray(lines)
    assert levels.shape == (128, 128, 3) and set(np.unique(levels)) == {0, 255}
    assert levels[25, 30:95].all() and not levels[40:90, 40:90].any()


def test_a_sketch_of_depth_stays_and_one_of_colours_becomes_cells(slot: ControlSlot) -> None:
    depth, _ = made(slot, "sketch", "depth", sketch=sketch("black", "#8c8c8c"))
    levels = np.asarray(depth)
    assert abs(int(levels.max()) - 0x8C) < 6 and levels[0, 0, 0] == 0  # made smaller, smoothly
    url = sketch("white", "red")
    cells, _ = made(slot, "sketch", "palette", sketch=url)
    assert np.array_equal(cells, palette(np.asarray(cells)))  # flat cells stay as they are
    empty, _ = made(slot, "sketch", "canny", sketch="")
    assert empty is None


def test_the_skeleton_draws_poses_and_the_pad_does_not(slot: ControlSlot, studio: Any) -> None:
    record = json.dumps(poses()["standing"])
    drawn, kind = made(slot, "skeleton", "canny", skeleton=record)
    assert kind == "pose" and np.asarray(drawn).any()
    _, kind = made(slot, "sketch", "pose", sketch=sketch("white", "black"))
    assert kind == "canny"
    with pytest.raises(gradio.Error, match="people"):
        made(slot, "skeleton", "pose", skeleton='{"persons": []}')


def test_a_scene_gives_its_exact_maps(slot: ControlSlot, studio: Any) -> None:
    number = find_scene(5, "pose")
    sample = draw_batch("test", [number], size=128)
    depth, _ = made(slot, "scene", "depth", scene=number)
    assert np.array_equal(np.asarray(depth)[..., 0], depth_map(sample.depth[0].numpy()))
    pose, _ = made(slot, "scene", "pose", scene=number)
    assert np.array_equal(pose, draw_skeleton(sample.keypoints[0], 128)) and np.asarray(pose).any()
    assert render_scene(number, 128).prompt == sample.texts[0]
    shown = slot.surprise("pose", studio.own_size_name)
    assert np.asarray(shown[0]).any() and isinstance(shown[-1], str)


def test_examples_and_poses_are_whole(slot: ControlSlot, studio: Any) -> None:
    assert {example.kind for example in examples(studio)} == set(studio.kinds)
    for record in poses().values():
        assert np.asarray(studio.skeletons("pose", json.dumps(record))).any()


def test_controls_are_read_from_the_slots(studio: Any, tmp_path: Path) -> None:
    picture, large = str(tmp_path / "map.png"), str(tmp_path / "large.png")
    Image.new("RGB", (128, 128)).save(picture)
    Image.new("1", (6000, 5000)).save(large)
    mask = Image.new("RGB", (512, 512), "black")
    on = ["canny", picture, 0.5, 0.0, 0.75, data_url(mask)]
    off = ["", None, 1.0, 0.0, 1.0, ""]
    (control,) = read_controls(studio, [*off, *on, *off])
    assert control.image.size == (128, 128)
    assert (control.kind, control.scale, control.end) == ("canny", 0.5, 0.75) and control.mask.size == (512, 512)
    with pytest.raises(ValueError, match=r"control 2 \(Depth\) has no map yet"):
        read_controls(studio, [*off, "depth", None, 1.0, 0.0, 1.0, ""])
    with pytest.raises(ValueError, match="the map of control 1 is 6000x5000, more than 24 million"):
        read_controls(studio, ["canny", large, 1.0, 0.0, 1.0, ""])
    with pytest.raises(ValueError, match="the mask is no picture that can be read"):
        read_controls(studio, ["canny", picture, 1.0, 0.0, 1.0, "data:image/png;base64,AAAA"])


@pytest.mark.parametrize("text", ["/etc/hostname", '["/etc/hostname"]', '"/etc/hostname"'])
def test_a_pose_from_a_file_names_no_other_file(slot: ControlSlot, studio: Any, tmp_path: Path, text: str) -> None:
    file = tmp_path / "pose.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="the pose is"):
        slot._load("pose", studio.own_size_name, str(file))
    with pytest.raises(gradio.Error, match="The pose is"):
        made(slot, "skeleton", "pose", skeleton=text)
    file.write_text("\ufeff" + json.dumps(poses()["standing"]))
    shown = slot._load("pose", studio.own_size_name, str(file))
    assert np.array_equal(shown[0], studio.skeletons("pose", json.dumps(poses()["standing"])))


def test_a_model_of_several_sizes_reads_maps_of_the_chosen_one(tmp_path: Path) -> None:
    sizes = Studio(tiny_pipeline("canny", "pose", schedule={"family": "infinity", "budget": "0.06M"}))
    wide = next(name for name, (height, width) in sizes.sizes.items() if width == 2 * height)
    area = sizes.size(wide)
    photo, names = str(tmp_path / "photo.png"), ("photo", "sketch", "skeleton", "ready", "scene")
    drawn = Image.new("RGB", (area[1], area[0]), "white")
    ImageDraw.Draw(drawn).rectangle((4, 4, 12, area[0] - 4), fill="black")  # at the edge that a square cuts off
    drawn.save(photo)
    record = json.dumps(poses()["standing"])
    with gradio.Blocks():
        size = size_choice(sizes)
        slot = ControlSlot(sizes, 1, size=size)
        size.render()
    assert slot.size is size and size.value == sizes.own_size_name
    given = {"photo": photo, "ready": photo, "skeleton": record, "scene": 5, "sketch": data_url(drawn)}
    values = [given[name] for name in names]
    for source, kind in (("photo", "canny"), ("ready", "canny"), ("skeleton", "pose"), ("scene", "canny")):
        before, *_ = slot._changed_size(kind, source, sizes.own_size_name, *values)
        shown, mask, *_, pad, skeleton = slot._changed_size(kind, source, wide, *values)
        assert before.size == sizes.own_size[::-1] and shown.size == area[::-1]
        if source in ("photo", "ready"):
            assert np.ptp(np.asarray(shown)[:, :16]) and not np.ptp(np.asarray(before))
        for sheet in (mask, pad):
            assert (sheet["height"], sheet["width"], sheet["value"]) == (*area, "")
        assert (skeleton["height"], skeleton["width"]) == area
    lines, *_ = slot._from("sketch")("canny", wide, *values)
    assert lines.size == area[::-1] and np.asarray(lines)[:, :16].any()
    # a sheet of another shape begins again, and a control that is off stays folded
    assert slot._changed_size("canny", "sketch", wide, *values)[0] is None
    folded = slot._changed_size("", "photo", wide, *values)
    assert folded[0] is None and folded[4]["open"] is False


def test_changing_the_size_asks_every_slot_to_make_its_map_again() -> None:
    several = Studio(tiny_pipeline("canny", schedule={"family": "infinity", "budget": "0.06M"}))
    for studio, expected in ((several, 2), (Studio(tiny_pipeline("canny")), 0)):
        with gradio.Blocks() as page:
            size = size_choice(studio)
            slots = [ControlSlot(studio, number, size=size) for number in (1, 2)]
            size.render()
        listening = [function for function in page.fns.values() if (size._id, "input") in function.targets]
        assert len(listening) == expected
        assert all(slots[i].map in function.outputs for i, function in enumerate(listening))
