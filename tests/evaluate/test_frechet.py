"""Frechet distances whose value is known, and what is said where weights cannot be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from scaleweaver.evaluate.attributes import AttributeJudge
from scaleweaver.evaluate.frechet import ClipAgreement, InceptionDistance, JudgeFeatures, diversity, frechet_distance


def test_equal_sets_have_no_distance_and_a_shift_costs_its_square():
    features = np.random.default_rng(0).normal(size=(50, 6))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    shift = np.array([3.0, 0, 4, 0, 0, 0])
    assert frechet_distance(features + shift, features) == pytest.approx(25)


def test_standard_deviations_in_one_dimension():
    """N(0, 1) and N(2, 3): (2 - 0)^2 + (3 - 1)^2, with samples whose moments are exact."""
    a = np.array([[-1.0], [1.0]]) / 2**0.5
    b = 2 + 3 * a
    assert frechet_distance(a, b) == pytest.approx(4 + 4)


def test_covariances_that_do_not_commute():
    """tr(A + B - 2 (AB)^1/2) for two 2x2 matrices; (AB)^1/2 has the trace sqrt(tr AB + 2 sqrt(det AB))."""
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(400, 2)) @ rng.normal(size=(2, 2)) for _ in range(2))
    a, b = a - a.mean(0), b - b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    both = first @ second
    root = (np.trace(both) + 2 * np.linalg.det(both) ** 0.5) ** 0.5
    assert frechet_distance(a, b) == pytest.approx(np.trace(first) + np.trace(second) - 2 * root)


def test_fewer_pictures_than_features():
    rng = np.random.default_rng(2)
    few, more = rng.normal(size=(4, 30)), rng.normal(size=(5, 30))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6) and frechet_distance(few, more) > 1
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(few[:1], more)
    with pytest.raises(ValueError, match=r"shape \(4, 30\) and \(5, 29\)"):
        frechet_distance(few, more[:, 1:])


def test_diversity():
    same, square = np.ones((3, 4)), np.eye(2)
    assert diversity([same]) == pytest.approx(0) and diversity([square]) == pytest.approx(1)
    assert diversity([same, square]) == pytest.approx(0.5)
    assert diversity([np.ones((1, 4))]) is None


def test_features_of_the_judge():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extractor = JudgeFeatures(AttributeJudge(widths=(8, 8, 16, 16, 24)).eval())
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    features = extractor.features(pictures)
    assert features.shape == (3, 16 + 24) and extractor.title == "FD-judge"
    np.testing.assert_allclose(extractor.judge.features(pictures, batch=1), features, atol=1e-5)
    assert frechet_distance(features, extractor.features(pictures[::-1])) == pytest.approx(0, abs=1e-6)


def test_fid_and_clip_say_what_they_lack():
    pytest.importorskip("torchmetrics")
    with pytest.raises(ValueError, match=r"CLIP score cannot be had here .*Leave out --clip"):
        ClipAgreement("openai/clip-vit-base-patch16")
    try:
        import torch_fidelity  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ValueError, match=r"FID cannot be had here .*FD-judge needs no download"):
            InceptionDistance()


def test_clip_score_is_the_cosine_of_picture_and_prompt(tiny_clip: Path):
    pytest.importorskip("torchmetrics")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    clip = ClipAgreement(str(tiny_clip))
    clip.add(pictures, ["a b", "b"])
    processor, model = CLIPProcessor.from_pretrained(tiny_clip), CLIPModel.from_pretrained(tiny_clip)
    inputs = processor(text=["a b", "b"], images=list(pictures), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    cosine = (out.image_embeds * out.text_embeds).sum(1)  # (2,)
    assert clip.value() == pytest.approx(max(100 * cosine.mean().item(), 0), abs=1e-3)
