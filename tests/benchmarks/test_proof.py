"""Targets, shares with their errors, and what a meter of poses that confuses sides finds."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from proof.documents import fill, places
from proof.parts import either_side
from proof.shares import alike, difference, found, ratio
from proof.tables import documents
from proof.targets import TARGETS, target_table

from scaleweaver.controls.openpose import COCO_18
from scaleweaver.evaluate.meters import pose_meter

EARLIER = json.loads((Path(__file__).parents[2] / "benchmarks/results/toybox-earlier.json").read_text())


def rows(report, earlier=None) -> dict[str, list[str]]:
    """Cells after the name of each target."""
    lines = target_table(report, earlier).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells}


def measured():
    """A report of other weights: the earlier one with what it did not measure, and some numbers at their limits."""
    report = copy.deepcopy(EARLIER)
    report["settings"] |= {"count": 500, "weights": {"transformer": "other"}}
    parts = report["parts"]
    parts["tokenizer"]["psnr"] = 30.0
    parts["attributes"]["prompt alone"] |= {"kind": 0.849, "kind_error": 0.01, "color": 0.851, "color_error": 0.01}
    for kind, (start, end) in {"canny": (0.05, 0.05), "depth": (0.05, 0.001), "pose": (-0.05, 0.1)}.items():
        way = {"pictures": 200, "share": start / (start + end), "from 0": [start, 0.01], "to 1": [end, 0.01]}
        parts["control"][kind]["half way"] = way
    seen = {"pictures": 500, "kind": 0.9, "kind_error": 0.03, "count": 0.9, "count_error": 0.03}
    lost = {"pictures": 500, "kind": 0.85, "kind_error": 0.04, "count": 0.79, "count_error": 0.04}
    facts = {"prompt alone, seen": seen, "prompt alone, held out": lost}
    control = {"kind": "canny", "seen": [0.6, 0.01], "held out": [0.55, 0.01], "column": {"title": "F1, 1 px"}}
    parts["heldout"] = {"attributes": facts, "control": control, "judge": "x"}
    parts["size"] = {"together": 39.9}
    report["commands"] |= {"heldout": "python x", "size": "python x"}
    return report


def test_targets_are_held_to_their_limits():
    found = rows(measured())
    assert found["tokenizer: PSNR, dB"] == ["at least 30", "30.00", "yes", ""]
    assert found["prompt alone: kind right"][:3] == ["at least 0.85", "0.849 ± 0.010", "**no**"]
    assert found["prompt alone: colour right"][1:3] == ["0.851 ± 0.010", "yes"]
    assert found["prompt alone: all five right"][1:] == ["not measured", "-", "not measured"]
    canny = EARLIER["parts"]["control"]["canny"]["rows"]
    times = canny["strength 1.0"]["f1_1px"] / canny["without control"]["f1_1px"]
    assert found["canny F1, 1 px, times that without control"][1].startswith(f"{times:.2f} ± ") and times < 3
    assert found["canny F1, 1 px, times that without control"][2] == "**no**"
    way = "{} at strength 0.5: share of the way from 0 to 1".format
    assert found[way("canny")][1:3] == ["0.50", "yes"]
    assert found[way("depth")][2] == "**no**"  # not told from strength 1
    assert found[way("pose")][2] == "**no**"  # worse than without the control
    assert found[way("palette")][1:3] == ["not measured", "-"]
    assert found["held-out less seen combinations, worst of the five facts"][1:3] == ["-0.110 ± 0.050", "**no**"]
    assert found["held-out less seen combinations, canny F1, 1 px"][1:3] == ["-0.050 ± 0.014", "yes"]
    assert found["pose: PCK@0.1 by BlazePose"] == ["as a check", "not measured", "-", "not measured"]
    assert found["weights of all that ships, MB"][1:3] == ["39.9", "yes"]


def test_earlier_weights_stand_beside():
    report = measured()
    texts = documents(report, EARLIER)
    assert "earlier weights (200 scenes)" in texts["measured"] and "earlier weights (200 scenes)" in texts["targets"]
    found = rows(report, EARLIER)
    assert found["tokenizer: PSNR, dB"][-1] == f"{EARLIER['parts']['tokenizer']['psnr']:.2f}" != "30.00"
    assert found["prompt alone: all five right"][-1] == "not measured"
    assert "another judge" not in texts["targets"]
    report["parts"]["attributes"]["judge"] = "a new one"
    assert "read by another judge" in documents(report, EARLIER)["targets"]
    # no comparison with themselves, and bounds in the full tables only
    same = documents(EARLIER, EARLIER)
    assert "earlier weights" not in same["measured"]
    assert "true renders |" in same["measured"].splitlines()[7] and "true renders" not in same["targets"]
    assert len(same["targets"].splitlines()) == len(TARGETS) + 4


def test_a_share_has_the_error_of_its_pictures():
    facts = [{"kind": [True]}, {"kind": [False]}, {"kind": [True]}, {"kind": [True]}]
    values = np.array([1.0, 0, 1, 1])
    assert found(facts)["kind"] == 0.75
    assert found(facts)["kind_error"] == pytest.approx(values.std(ddof=1) / 2)
    # a fact told twice is not two facts, and a picture of which nothing is asked says nothing
    twice = [{"kind": each["kind"] * 2} for each in facts] + [{"pose": [True]}]
    assert found(twice)["kind_error"] == pytest.approx(found(facts)["kind_error"])
    assert found(twice)["pictures"] == 5 and found(twice)["pose_error"] is None
    assert "pose" not in found(facts) and ratio([0], [0]) is None
    assert difference((0.5, 0.03), (0.3, 0.04)) == pytest.approx((0.2, 0.05))
    assert difference((0.5, None), (0.25, 0.04)) == (0.25, None)


def test_seen_scenes_weigh_as_the_held_out_ones_are_made_up():
    thing, person = {"type": "thing"}, {"type": "person"}
    seen = [{"items": [thing]}] * 3 + [{"items": [thing, person]}]
    other = [{"items": [thing, thing]}] + [{"items": [thing]}] + [{"items": [person, thing]}] * 2
    weights = alike(seen, other)
    assert weights == pytest.approx([1 / 3] * 3 + [2.0])  # one in four and two in four, where three and one are
    facts = [{"kind": [True]}] * 3 + [{"kind": [False]}]
    assert found(facts, weights)["kind"] == pytest.approx(1 / 3)


def test_sides_that_fit_better():
    exact = np.dstack([np.arange(18.0) * 5, np.arange(18.0)[::-1] * 7, np.ones(18)])[0][None]  # (1, 18, 3)
    names = [name.replace("left", "x").replace("right", "left").replace("x", "right") for name in COCO_18]
    mirrored = exact[:, [COCO_18.index(name) for name in names]]
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    pictures[1:] += np.array([1, 2], np.uint8)[:, None, None, None]
    answers = {0: exact, 1: mirrored, 2: np.zeros((0, 18, 3))}
    meter = pose_meter(lambda seen: [answers[int(picture[0, 0, 0])] for picture in seen], "test")
    part = either_side(meter, {"strength 1.0": pictures}, [exact] * 3)
    row = part["rows"]["strength 1.0"]
    assert row["pictures"] == 3 and row["pck_either"] == pytest.approx(2 / 3)
    assert 1 / 3 < row["pck"] < 0.5  # nose and neck have no side
    assert [column["name"] for column in part["columns"]][:2] == ["pck", "pck_either"]


def test_documents_are_filled_where_they_have_a_place(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n")
    assert places(document, ["one", "two", "three"]) == ["one", "two"]
    for _ in range(2):
        fill(document, {"one": "new\n", "three": "nowhere"})
        assert document.read_text() == "a\n<!-- one -->\nnew\n\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n"
    with pytest.raises(ValueError, match="no place for the tables; write one of <!-- three -->"):
        places(document, ["three"])
