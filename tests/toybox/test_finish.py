import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from scaleweaver.toybox.finish import FINISHES, PATTERNS, marks_of, patterned, second_color
from scaleweaver.toybox.mesh import turn
from scaleweaver.toybox.render import _draw, render
from scaleweaver.toybox.scene import COLORS, Camera, Scene, Thing

CUBE = Thing("cube", "red", "large", "matte", -0.5, 0.0, 0.0, 0.3)
BALL = Thing("ball", "blue", "medium", "matte", 0.7, 0.0, 0.0, 0.0)
SCENE = Scene((CUBE, BALL), "grass", "noon", 0.7, 0.8, Camera(1.2, 0.2, 2.6, 4.0))


def pictures(*things: Thing, size: int = 64):
    return render([replace(SCENE, items=(thing, BALL)) for thing in things], size=size)


@pytest.mark.parametrize("pattern", ["striped", "dotted"])
def test_a_pattern_changes_the_thing_and_nothing_else(pattern):
    frames = pictures(CUBE, replace(CUBE, pattern=pattern))
    plain, drawn = frames.image
    changed = (plain - drawn).abs().amax(0) > 1e-4
    own = frames.ids[0] == 1
    grown = torch.nn.functional.max_pool2d(own[None].float(), 3, 1, 1)[0] > 0  # pixels of its outline are shared
    assert not changed[~grown].any()
    assert 0.1 < changed[own].float().mean() < 0.8  # two colours, both to be seen
    assert torch.equal(frames.ids[0], frames.ids[1]) and torch.equal(frames.depth[0], frames.depth[1])


def test_patterns_differ():
    striped, dotted = pictures(*(replace(CUBE, pattern=pattern) for pattern in ("striped", "dotted"))).image
    assert (striped - dotted).abs().mean() > 0.01


@pytest.mark.parametrize("pattern", ["striped", "dotted"])
def test_patterns_move_and_turn_with_the_thing(pattern):
    random = torch.Generator().manual_seed(0)
    points, normals = (torch.randn(3, 500, generator=random, dtype=torch.float64) for _ in range(2))
    color, yaw, place = np.array(COLORS["red"]), 0.6, (0.4, -1.2, 0.3)
    turned = torch.from_numpy(turn("z", math.degrees(yaw)).astype(np.float64))

    def drawn(points, normals, place, yaw):
        marks = torch.from_numpy(marks_of("matte", pattern, color, place, yaw))[:, None].expand(-1, 500)
        return patterned(marks, torch.from_numpy(color)[:, None].expand(3, 500), points, normals)

    here = drawn(points, normals, (0.0, 0.0, 0.0), 0.0)
    there = drawn(turned @ points + torch.tensor(place)[:, None], turned @ normals, place, yaw)
    assert (here == there).all(0).double().mean() > 0.99  # points on an edge may fall to either side
    assert 0.1 < (here != torch.from_numpy(color)[:, None]).any(0).double().mean() < 0.6


def test_fixed_colours_keep_no_pattern():
    duck = replace(CUBE, kind="duck", color="yellow", size="large", yaw=0.0)
    frames = pictures(duck, replace(duck, pattern="striped"), size=96)
    carrot = (frames.image[0][0] > 0.7) & (frames.image[0][1] < 0.6) & (frames.ids[0] == 1)
    assert carrot.sum() > 10  # the beak
    assert (frames.image[0] - frames.image[1]).abs().amax(0)[carrot].median() < 1e-4


@pytest.mark.parametrize("color", COLORS)
def test_second_colours_can_be_told_from_the_first(color):
    first = np.array(COLORS[color])
    assert np.abs(second_color(first) - first).max() > 0.3


def between(first: int, last: int) -> torch.Tensor:
    """Rows of a picture of 96 as a mask."""
    rows = torch.arange(96)[:, None].expand(96, 96)
    return (rows >= first) & (rows < last)


def test_metal_mirrors_the_sky_and_the_ground():
    ball = replace(BALL, x=-0.5, size="large", color="red")
    frames = pictures(ball, replace(ball, finish="glossy"), replace(ball, finish="metal"), size=96)
    own = frames.ids[0] == 1
    rows = own.any(1).nonzero()[:, 0]
    middle = int(rows.float().mean())
    upper, lower = (own & mask for mask in (between(middle - 8, middle), between(middle + 4, middle + 12)))
    contrast = [float(image[0][upper].mean() - image[0][lower].mean()) for image in frames.image]
    assert contrast[2] > contrast[0] + 0.05 and contrast[2] > contrast[1] + 0.05
    shown = frames.image[2][:, own].mean(1)
    assert shown.argmax() == 0  # and still is red
    other = render([replace(SCENE, items=(replace(ball, finish="metal"),), ground="snow")], size=96)
    same = (other.ids[0] == 1) & own
    assert (other.image[0] - frames.image[2])[:, same].abs().mean() > 0.01


def test_a_batch_draws_what_each_scene_draws_alone():
    kinds = [replace(CUBE, finish=finish, pattern=pattern) for finish in FINISHES for pattern in PATTERNS]
    scenes = [replace(SCENE, items=(thing, BALL)) for thing in kinds]
    alone, together = render(scenes, size=32), _draw(scenes, 32, 2, torch.device("cpu"))
    assert (alone.image - together.image).abs().max() < 1e-4


def test_wrong_words_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"no pattern 'checked'.*dotted"):
        pictures(replace(CUBE, pattern="checked"))
    with pytest.raises(ValueError, match=r"no finish 'furry'.*metal"):
        pictures(replace(CUBE, finish="furry"))
