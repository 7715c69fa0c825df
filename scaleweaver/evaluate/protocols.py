"""Settings of published evaluations, as far as they are known, for users who have their data and weights.

Read in the public code of ControlNet++ (arXiv 2404.07987) and ControlAR (arXiv 2410.02705); their numbers come from
their own pictures, detectors and metric code, so equality with published tables is not claimed. Known differences are
named in `note`, which every report shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EvaluationProtocol:
    """What a published evaluation fixes. `detectors` are preprocessor settings by kind."""

    name: str
    note: str
    images_per_prompt: int
    size: int
    count: int
    detectors: Mapping[str, Mapping[str, Any]]
    call: Mapping[str, Any] = field(default_factory=dict)


_DETECTORS: Mapping[str, Mapping[str, Any]] = {
    "canny": {"low": 100, "high": 200},
    "depth": {"model": "Intel/dpt-large"},
}
PROTOCOLS = {
    "controlnet++": EvaluationProtocol(
        name="controlnet++",
        note=(
            "four images a prompt at 512, F1 over the four stacked maps (F1, stacked), legacy depth RMSE, mean over"
            " prompts. Theirs: MultiGen-20M validation, Stable Diffusion 1.5, guidance 7.5, 20 steps, and for canny a"
            " differentiable detector (thresholds 0.1 and 0.2 after a 5x5 Gaussian); here OpenCV's at 100/200. Theirs"
            " divides the network's own depth by its maximum, here it is stretched from minimum to maximum before."
        ),
        images_per_prompt=4,
        size=512,
        count=5000,
        detectors=_DETECTORS,
        call={"negative_prompt": "worst quality, low quality"},
    ),
    "controlar": EvaluationProtocol(
        name="controlar",
        note=(
            "one image a prompt at 512, strict F1 with OpenCV's canny at 100/200, mean over images. Theirs: 5,000"
            " pictures of MultiGen-20M, 2,000 of ADE20K, FID by clean-fid against the real ones."
        ),
        images_per_prompt=1,
        size=512,
        count=5000,
        detectors=_DETECTORS,
    ),
}


def protocol(name: str) -> EvaluationProtocol:
    """A protocol by name."""
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}; pass one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
