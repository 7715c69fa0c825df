"""Meters: true pictures score best against their own targets, and means are taken over prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.controls.palette import Palette
from scaleweaver.evaluate.examples import ToyboxExamples, meter_of
from scaleweaver.evaluate.meters import depth_meter, edge_meter, map_meter, means, pose_meter


@pytest.fixture(scope="module")
def data() -> ToyboxExamples:
    return ToyboxExamples("test", ("canny", "depth", "pose", "palette"), size=64, people=True)


def test_means_are_taken_over_prompts_and_errors_between_them():
    groups = [[{"a": 1.0}, {"a": 3.0}], [{"a": 5.0}, {"a": None}], [{"a": None}]]
    summary = means(groups, ("a",))
    assert summary == {"a": 3.5, "a_error": pytest.approx(np.std([2, 5], ddof=1) / 2**0.5)}
    assert means([[{"a": 2.0}]], ("a",)) == {"a": 2.0, "a_error": None}
    assert means([[{}]], ("a",)) == {"a": None, "a_error": None}


@pytest.mark.parametrize("kind", ["canny", "depth", "pose", "palette"])
def test_a_wrong_map_scores_below_the_right_one(data, kind):
    """With readers that know the truth, so that only the comparison is measured."""
    examples = data.read(range(6))
    pictures = np.stack([example.reference for example in examples])
    truth = [example.targets[kind] for example in examples]
    meter = {
        "canny": lambda: edge_meter(),
        "depth": lambda: depth_meter(lambda _: truth, "the truth"),
        "pose": lambda: pose_meter(lambda _: truth, "the truth"),
        "palette": lambda: map_meter("palette", Palette(), "palette"),
    }[kind]()
    own = meter.summarise([[one] for one in meter.measure(pictures, truth)])
    wrong = meter.summarise([[one] for one in meter.measure(pictures, truth[1:] + truth[:1])])
    higher = next(column.higher for column in meter.columns if column.name == meter.main)
    assert own[meter.main] == pytest.approx(1.0 if higher else 0.0, abs=1e-9)
    assert wrong[meter.main] < 0.6 if higher else wrong[meter.main] > 10
    named = {column.name for column in meter.columns} - {"f1_stacked"}
    assert named <= set(own), "a column without a number"


def test_several_pictures_of_a_prompt_are_stacked_too(data):
    first, second = data.read([0, 1])
    meter = edge_meter()
    pictures = np.stack([first.reference, second.reference])
    scores = meter.measure(pictures, [first.targets["canny"]] * 2)
    summary = meter.summarise([scores])
    assert summary["f1"] < summary["f1_stacked"] < 1 or summary["f1"] > 0.9
    assert "f1_stacked" not in meter.summarise([[one] for one in scores])


def test_what_is_exact_needs_an_estimator(data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        estimator = ToyboxEstimator(widths=(8, 8, 8, 8, 8), size=32).eval()
    examples = data.read(range(2))
    pictures = np.stack([example.reference for example in examples])
    for kind in ("depth", "pose"):
        with pytest.raises(ValueError, match="needs an estimator"):
            meter_of(kind, data)
        meter = meter_of(kind, data, estimator)
        assert meter.source.startswith("ToyboxEstimator ") and meter.kind == kind
        assert len(meter.measure(pictures, [example.targets[kind] for example in examples])) == 2
    assert meter_of("canny", data).source == "opencv canny 100/200"
    assert meter_of("palette", data).source.startswith("Palette(")
