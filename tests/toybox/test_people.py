import math

import numpy as np
import pytest

from scaleweaver.toybox import people
from scaleweaver.toybox.scene import Person

QUIET = (0.0,) * people.JOINT_NOISE_SIZE
POINT = {name: number for number, name in enumerate(people.KEYPOINTS)}


def person(pose: str = "standing", **changes) -> Person:
    facts = {
        "build": "man",
        "joint_noise": QUIET,
        "skin": "tan",
        "hair": "short",
        "hair_color": "brown",
        "shirt": "red",
        "trousers": "blue",
        "x": 0.0,
        "y": 0.0,
        "yaw": 0.0,
    }
    return Person(pose=pose, **{**facts, **changes})


def test_there_is_choice():
    assert len(people.POSES) >= 10 and len(people.HAIR_STYLES) >= 6 and len(people.SKINS) >= 4
    assert set(people.BUILDS) == {"man", "woman", "boy", "girl"}
    assert len(people.KEYPOINTS) == 18


@pytest.mark.parametrize("build", people.BUILDS)
@pytest.mark.parametrize("pose", people.POSES)
def test_every_pose_of_every_build_stands_on_the_ground_and_keeps_its_bones(build, pose):
    rng = np.random.default_rng(0)
    rest = people.keypoints(person(build=build))
    noisy = person(pose, build=build, joint_noise=tuple(rng.standard_normal(people.JOINT_NOISE_SIZE)), x=0.4, y=-0.2)
    mesh, points = people.posed(noisy), people.keypoints(noisy)
    assert points.shape == (18, 3) and np.isfinite(points).all()
    lowest = mesh.vertices[:, 2].min()
    assert lowest > 0.1 if pose in ("jumping", "star jump") else abs(lowest) < 1e-4
    for bone in (("right shoulder", "right elbow"), ("left elbow", "left wrist"), ("right hip", "right knee")):
        a, b = (POINT[name] for name in bone)
        assert np.linalg.norm(points[a] - points[b]) == pytest.approx(np.linalg.norm(rest[a] - rest[b]), abs=1e-4)
    # every joint lies in or on the body
    nearest = np.linalg.norm(mesh.vertices[None] - points[:, None], axis=2).min(axis=1)
    assert nearest.max() < 0.2


def test_sides_and_heights_follow_the_names():
    points = people.keypoints(person())
    assert points[POINT["left shoulder"], 0] > 0 > points[POINT["right shoulder"], 0]  # facing the camera
    assert points[POINT["nose"], 1] < points[POINT["neck"], 1] - 0.1
    order = ["left ear", "neck", "left elbow", "left hip", "left knee", "left ankle"]
    heights = [points[POINT[name], 2] for name in order]
    assert heights == sorted(heights, reverse=True)
    assert 1.6 < people.posed(person()).vertices[:, 2].max() < 2.0
    assert people.posed(person(build="girl")).vertices[:, 2].max() < 1.5


def test_poses_do_what_they_say():
    neck, crown = POINT["neck"], POINT["nose"]
    up = people.keypoints(person("arms up"))
    assert min(up[POINT["right wrist"], 2], up[POINT["left wrist"], 2]) > up[crown, 2]
    cross = people.keypoints(person("t pose"))
    assert np.ptp(cross[[POINT["right wrist"], POINT["right shoulder"], POINT["left wrist"]], 2]) < 0.05
    wave = people.keypoints(person("waving"))
    assert wave[POINT["right wrist"], 2] > wave[neck, 2] > wave[POINT["left wrist"], 2]
    sit = people.keypoints(person("sitting"))
    assert sit[POINT["left hip"], 2] < 0.3 and sit[POINT["left ankle"], 1] < sit[POINT["left hip"], 1] - 0.4
    kneel = people.keypoints(person("kneeling"))
    assert kneel[POINT["left knee"], 2] < 0.2 and kneel[POINT["right ankle"], 2] < 0.25
    point = people.keypoints(person("pointing"))
    assert point[POINT["left wrist"], 0] > point[POINT["left shoulder"], 0] + 0.4
    hips = people.keypoints(person("hands on hips"))
    assert hips[POINT["left elbow"], 0] > hips[POINT["left wrist"], 0] + 0.05
    hand = people.keypoints(person("handstand"))
    assert hand[POINT["left ankle"], 2] > hand[POINT["left hip"], 2] > hand[neck, 2] > hand[POINT["left wrist"], 2]
    lie = people.keypoints(person("lying"))
    assert np.ptp(lie[:, 2]) < 0.8 < np.ptp(lie[:, 0])
    crawl = people.keypoints(person("crawling"))
    assert max(crawl[[POINT["left wrist"], POINT["left knee"]], 2]) < 0.25 < crawl[POINT["left hip"], 2]
    balance = people.keypoints(person("balancing"))
    assert balance[POINT["left ankle"], 2] > balance[POINT["right knee"], 2] > balance[POINT["right ankle"], 2]
    kick = people.keypoints(person("kicking"))
    assert kick[POINT["right ankle"], 2] > 0.4 and kick[POINT["right ankle"], 1] < -0.4


def test_yaw_turns_the_person_about_its_place():
    ahead, turned = (people.keypoints(person("kicking", x=0.5, yaw=yaw)) for yaw in (0.0, math.pi / 2))
    flat = ahead - [0.5, 0, 0]
    assert np.allclose(turned, np.stack([-flat[:, 1] + 0.5, flat[:, 0], flat[:, 2]], axis=1), atol=1e-5)


def test_joint_noise_moves_joints_a_little_and_never_bends_a_knee_forwards():
    rng = np.random.default_rng(1)
    rest = people.keypoints(person())
    moves = []
    for _ in range(20):
        points = people.keypoints(person(joint_noise=tuple(rng.standard_normal(people.JOINT_NOISE_SIZE))))
        moves.append(np.linalg.norm(points - rest, axis=1))
        for side in ("right", "left"):
            hip, knee, ankle = (points[POINT[f"{side} {name}"]] for name in ("hip", "knee", "ankle"))
            assert np.cross(knee - hip, ankle - knee)[0] > -0.02  # about the x axis: backwards or straight
    assert 0.02 < np.mean(moves) < 0.2


def test_wrong_words_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"no pose 'flying'.*standing"):
        people.posed(person("flying"))
    with pytest.raises(ValueError, match=r"no hair style 'wig'.*bob"):
        people.posed(person(hair="wig"))
    with pytest.raises(ValueError, match="joint_noise has 3 numbers"):
        people.keypoints(person(joint_noise=(0.0, 0.0, 0.0)))
