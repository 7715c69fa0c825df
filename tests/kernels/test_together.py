"""All kernels at once: the picture that they draw is torch's."""

from __future__ import annotations

import pytest
import torch
from kernel_errors import DEVICE
from tiny_pipeline import PROMPT, add_tiny_control, edges, latent, tiny_pipeline
from torch.testing import assert_close

from scaleweaver.kernels.dispatch import use_kernels

pytest.importorskip("triton")


def test_a_controlled_picture_is_the_same_on_kernels():
    pipe = tiny_pipeline("canny")
    add_tiny_control(pipe, "depth", seed=1, z_position="after_gate")
    pipe.to(DEVICE)
    given = {"control": {"canny": edges(), "depth": edges(1)}, "control_guidance_scale": 2.0}
    given |= {"num_images_per_prompt": 2, "top_p": 0.95}
    found = []
    for on in (False, True):
        with use_kernels(on):
            found.append(latent(pipe, PROMPT, **given))
    assert len(found[0]) == 2 and not torch.equal(found[0][0], found[0][1])
    assert_close(found[1], found[0])  # every bit is alike
