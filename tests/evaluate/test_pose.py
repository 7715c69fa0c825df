"""PCK, object key-point similarity and average precision against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from scaleweaver.evaluate.pose import K, average_precision, greedy_pairs, oks, pose_scores, pose_summary
from scaleweaver.toybox.dataset import draw_batch

NOSE, NECK, ANKLE = 0, 1, 10


def person(x: float = 0.0, y: float = 0.0, width: float = 20.0, height: float = 40.0) -> np.ndarray:
    """Eighteen joints on the diagonal of a box, all there."""
    steps = np.linspace(0, 1, 18)
    return np.stack([x + width * steps, y + height * steps, np.ones(18)], axis=1)


def moved(points: np.ndarray, joint: int, by: float) -> np.ndarray:
    changed = points.copy()
    changed[joint, 0] += by
    return changed


def image(people: int, *found: tuple[float, list[float]]) -> dict:
    """A picture's contribution: how sure each found person is, and how like every wanted one."""
    return {"people": people, "confidence": [sure for sure, _ in found], "oks": [row for _, row in found]}


def test_pck_counts_joints_within_a_tenth_of_the_height():
    wanted = person()[None]
    assert pose_scores(wanted, wanted)["pck"] == 1.0
    near, far = moved(wanted[0], 3, 3.9), moved(wanted[0], 3, 4.1)  # a tenth of the height is 4
    assert pose_scores(near[None], wanted)["pck"] == 1.0
    assert pose_scores(far[None], wanted)["pck"] == pytest.approx(17 / 18)
    hidden = wanted.copy()
    hidden[0, 3, 2] = 0  # was not asked for
    assert pose_scores(far[None], hidden)["pck"] == 1.0
    lost = wanted[0].copy()
    lost[3, 2] = 0  # was not found
    assert pose_scores(lost[None], wanted)["pck"] == pytest.approx(17 / 18)


def test_similarity_is_that_of_coco():
    """exp(-d^2 / (2 s^2 k^2)) with s^2 = 20 * 40 and k twice the annotators' deviation; the neck is left out."""
    wanted = person()
    assert K[NOSE] == pytest.approx(0.052) and K[ANKLE] == pytest.approx(0.178) and np.isnan(K[NECK])
    assert oks(wanted, wanted) == 1.0
    assert oks(moved(wanted, NECK, 9.0), wanted) == 1.0
    one = np.exp(-(2.0**2) / (2 * 800 * 0.052**2))
    assert oks(moved(wanted, NOSE, 2.0), wanted) == pytest.approx((16 + one) / 17)
    smaller = np.exp(-(2.0**2) / (2 * 0.53 * 800 * 0.178**2))
    assert oks(moved(wanted, ANKLE, 2.0), wanted, area_factor=0.53) == pytest.approx((16 + smaller) / 17)


def test_people_are_matched_best_first_and_once():
    table = np.array([[0.6, 0.9], [0.5, 0.8]])
    assert sorted(greedy_pairs(table)) == [(0, 1), (1, 0)]  # (wanted, found): 0.9 first, 0.5 is what is left
    left, right = person(0), person(60)
    scores = pose_scores(np.stack([right, left]), np.stack([left, right]))
    assert scores["pck"] == 1.0 and scores["count_error"] == 0 and scores["people"] == 2
    alone = pose_scores(left[None], np.stack([left, right]))
    assert alone["pck"] == 0.5 and alone["count_error"] == 1


def test_average_precision_by_hand():
    assert average_precision([image(1, (0.9, [0.8]))], 0.5) == 1.0
    assert average_precision([image(1, (0.9, [0.8]))], 0.85) == 0.0
    assert average_precision([image(1)], 0.5) == 0.0
    # sure and wrong before unsure and right: precision is 1/2 at every recall
    assert average_precision([image(1, (0.9, [0.1]), (0.5, [0.8]))], 0.5) == pytest.approx(0.5)
    # the other way round the wrong one costs nothing
    assert average_precision([image(1, (0.5, [0.1]), (0.9, [0.8]))], 0.5) == 1.0
    # one of two is found: precision 1 at 51 of the 101 recalls
    assert average_precision([image(1, (0.9, [0.8])), image(1)], 0.5) == pytest.approx(51 / 101)
    # two detections of one person: the second is wrong
    assert average_precision([image(2, (0.9, [0.8, 0.1]), (0.8, [0.8, 0.1]))], 0.5) == pytest.approx(51 / 101)


def test_summary_averages_ten_thresholds():
    summary = pose_summary([image(1, (0.9, [0.72]))])
    assert summary == {"ap": pytest.approx(0.5), "ap50": 1.0, "ap75": 0.0}  # .50 .55 .60 .65 .70
    assert pose_summary([image(0), image(0, (0.9, []))]) == {}


def test_nobody():
    nobody, somebody = np.zeros((0, 18, 3)), person()[None]
    empty = pose_scores(nobody, nobody)
    assert empty["pck"] is None and empty["count_error"] == 0
    assert pose_scores(nobody, somebody)["pck"] == 0.0 and pose_scores(nobody, somebody)["count_error"] == 1
    assert pose_scores(somebody, nobody)["count_error"] == 1
    unseen = somebody.copy()
    unseen[..., 2] = 0
    assert pose_scores(unseen, somebody)["count_error"] == 1  # nobody is there to be seen


def test_exact_poses_match_themselves_and_not_each_other():
    batch = draw_batch("test", range(12), size=64)
    people = [points for points in batch.keypoints if len(points)]
    assert len(people) > 2
    assert {pose_scores(p, p)["pck"] for p in people} == {1.0}
    others = [pose_scores(people[i - 1], p)["pck"] for i, p in enumerate(people)]
    assert np.mean(others) < 0.5


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected \(people, 18, 3\)"):
        pose_scores(np.zeros((1, 17, 3)), person()[None])
