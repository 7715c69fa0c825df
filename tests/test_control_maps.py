"""Maps of photos as a control's record says that its training maps were made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from scaleweaver.control_maps import detector_of, map_of_photo
from scaleweaver.controls import Canny, Depth, Palette, Pose, SoftEdge
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"kind": "canny"}, Canny()),
        ({"kind": "canny", "detector": "opencv-canny", "thresholds": (30, 90)}, Canny(30, 90)),
        ({"kind": "depth", "detector": "toybox-depth"}, Depth("toybox")),
        ({"kind": "depth", "detector": "Intel/dpt-large"}, Depth("Intel/dpt-large")),
        ({"kind": "depth"}, Depth()),
        ({"kind": "depth", "detector": "midas"}, Depth("midas")),  # refused by name when it is asked for a map
        ({"kind": "pose", "detector": "toybox-pose"}, Pose("toybox")),
        ({"kind": "pose", "detector": "vitpose"}, Pose("vitpose")),
        ({"kind": "palette", "detector": "palette-16"}, Palette(16)),
        ({"kind": "palette"}, Palette()),
        ({"kind": "softedge", "detector": "hed"}, SoftEdge("hed")),
    ],
)
def test_the_detector_of_a_record(record: dict[str, Any], expected: Any) -> None:
    assert detector_of(ScaleWeaverConfig(**record)) == expected


def test_a_kind_that_no_preprocessor_makes() -> None:
    with pytest.raises(ValueError, match=r"no preprocessor makes 'subject' maps.* or pass a ready map"):
        detector_of(ScaleWeaverConfig(kind="subject"))


def test_the_photo_is_brought_to_the_size_of_the_training_maps() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    config = ScaleWeaverConfig(kind="canny", thresholds=(30, 90), resolution=30)
    expected = Canny(30, 90)(photo.resize((45, 30), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(map_of_photo(photo, config)), np.asarray(expected))
    assert map_of_photo(photo, config, side=20).size == (30, 20)
    assert map_of_photo(photo, ScaleWeaverConfig(kind="canny")).size == (90, 60)
    with pytest.raises(ValueError, match="control 'canny': there is no file"):
        map_of_photo("missing.png", config)
