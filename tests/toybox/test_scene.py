import json
import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from scaleweaver.toybox import compose
from scaleweaver.toybox.looks import GROUNDS, SKIES
from scaleweaver.toybox.people import POSES
from scaleweaver.toybox.scene import (
    COLORS,
    SPLITS,
    Camera,
    Person,
    Scene,
    Thing,
    attributes,
    held_out_pairs,
    is_held_out,
    relations,
    sample_scene,
)
from scaleweaver.toybox.stage import project
from scaleweaver.toybox.things import KINDS
from scaleweaver.toybox.worlds import world_of

TRAIN = [sample_scene("train", i) for i in range(300)]


def thing(x: float, y: float, z: float = 0.0, **changes) -> Thing:
    return Thing(
        **({"kind": "cube", "color": "red", "size": "medium", "finish": "matte"} | changes), x=x, y=y, z=z, yaw=0.0
    )


def scene_of(*items: Thing | Person) -> Scene:
    return Scene(items, "grass", "noon", 0.5, 0.8, Camera(1.0, 0.2, 3.0, 3.0))


def test_a_scene_depends_on_split_index_and_version_alone():
    for split in SPLITS:
        assert sample_scene(split, 7) == sample_scene(split, 7)
    scenes = [
        sample_scene(split, index, version=version) for split in SPLITS for index in (0, 1, 2) for version in (1, 2)
    ]
    assert len(set(scenes)) == len(scenes)
    assert sample_scene("train", 2**40) != sample_scene("train", 2**40 + 1)


def test_scenes_are_the_same_in_another_process():
    code = "from scaleweaver.toybox.scene import sample_scene; print(sample_scene('val', 5))"
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip() == str(sample_scene("val", 5))


def test_held_out_pairs_appear_in_their_split_only():
    pairs = [(color, kind) for color in COLORS for kind in KINDS] + [
        (pose, color) for pose in POSES for color in COLORS
    ]
    assert 0.02 < np.mean([is_held_out(*pair) for pair in pairs]) < 0.09
    # every colour, kind and pose is still learnt from other combinations
    assert all(not all(is_held_out(color, kind) for color in COLORS) for kind in KINDS)
    for split in ("train", "val", "test"):
        assert not any(held_out_pairs(sample_scene(split, i)) for i in range(100))
    assert all(held_out_pairs(sample_scene("heldout", i)) for i in range(40))


def test_everything_is_in_view_and_large():
    fills = []
    for scene in TRAIN:
        edges = [compose.rectangle(item, scene.camera) for item in scene.items]
        assert all(abs(edge) < 1 for rectangle in edges for edge in rectangle)
        fills.append(max(max(right - left, top - bottom) / 2 for left, bottom, right, top in edges))
    assert min(fills) > 0.28 and 0.5 < np.median(fills) < 0.8


def test_rectangle_agrees_with_the_renderer():
    camera = Camera(1.2, 0.2, 3.1, 3.0)
    item = thing(0.3, 0.1)
    size = compose.box(item)
    corners = np.array(
        [
            (item.x + x, item.y + y, z)
            for x in (size.left, size.right)
            for y in (size.near, size.far)
            for z in (0, size.height)
        ]
    )
    screen = project(corners, camera)
    left, bottom, right, top = compose.rectangle(item, camera)
    assert left == pytest.approx(2 * screen[:, 0].min() - 1) and right == pytest.approx(2 * screen[:, 0].max() - 1)
    assert top == pytest.approx(1 - 2 * screen[:, 1].min()) and bottom == pytest.approx(1 - 2 * screen[:, 1].max())


def test_nothing_stands_in_another():
    for scene in TRAIN:
        for one, other in combinations(scene.items, 2):
            a, b = compose.box(one), compose.box(other)
            apart = max(
                other.x + b.left - one.x - a.right,
                one.x + a.left - other.x - b.right,
                other.y + b.near - one.y - a.far,
                one.y + a.near - other.y - b.far,
                compose.base(other) - compose.base(one) - a.height,
                compose.base(one) - compose.base(other) - b.height,
            )
            assert apart > -1e-6, scene


def test_only_flat_tops_carry():
    stacks = [(s.items[i], s.items[j]) for s in TRAIN for i, relation, j in relations(s) if relation == "on top of"]
    assert len(stacks) > 10
    for rider, carrier in stacks:
        assert KINDS[carrier.kind].flat_top
        assert rider.z == pytest.approx(compose.box(carrier).height)


def test_relations_follow_the_positions():
    assert relations(scene_of(thing(-1, 0), thing(1, 0))) == [(0, "left of", 1)]
    assert relations(scene_of(thing(1, 0), thing(-1, 0.2))) == [(0, "right of", 1)]
    assert relations(scene_of(thing(0, -1), thing(0.5, 1))) == [(0, "in front of", 1)]
    assert relations(scene_of(thing(0, 1), thing(0, -1))) == [(0, "behind", 1)]
    assert relations(scene_of(thing(0, 0), thing(0, 0, 0.86))) == [(1, "on top of", 0)]
    assert relations(scene_of(thing(0, 0), thing(1, 1))) == []  # neither beside nor behind


def test_the_mix_of_scenes():
    people = np.mean([isinstance(scene.items[0], Person) for scene in TRAIN])
    assert 0.27 < people < 0.43
    alone = [len(scene.items) for scene in TRAIN if isinstance(scene.items[0], Thing)]
    assert 0.35 < np.mean(np.array(alone) == 1) < 0.56 and 0.05 < np.mean(np.array(alone) == 3) < 0.25
    assert {scene.ground for scene in TRAIN} == set(GROUNDS) and {scene.sky for scene in TRAIN} == set(SKIES)
    assert {item.kind for scene in TRAIN for item in scene.items if isinstance(item, Thing)} == set(world_of(1).kinds)
    assert {relation for scene in TRAIN for _, relation, _ in relations(scene)} == {
        "left of",
        "right of",
        "in front of",
        "behind",
        "on top of",
    }
    assert all(math.radians(5) < scene.camera.pitch < math.radians(20) for scene in TRAIN)


def test_attributes_tell_the_scene_in_json():
    for scene in TRAIN[:50]:
        facts = attributes(scene)
        assert json.loads(json.dumps(facts)) == facts
        assert facts["count"] == len(facts["items"]) == len(scene.items)
        for item, fact in zip(scene.items, facts["items"], strict=True):
            assert fact["type"] == ("thing" if isinstance(item, Thing) else "person")
            assert all(getattr(item, name) == value for name, value in fact.items() if name != "type")
        assert [tuple(link) for link in facts["relations"]] == relations(scene)


@pytest.mark.parametrize(
    ("split", "index", "says"), [("trian", 0, "train, val, test"), ("train", -1, "not be negative")]
)
def test_bad_arguments_are_told(split, index, says):
    with pytest.raises(ValueError, match=says):
        sample_scene(split, index)
