"""Fixtures of the tokenizer tests: reference files and a tiny real tokenizer."""

import json
from collections.abc import Callable

import pytest
import torch
from bsq_golden import SMALL, Golden, load

from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer


@pytest.fixture(params=["bsq_vae_tiny-sq", "bsq_vae_tiny-ns", "bsq_vae_tiny_8b-sq", "bsq_vae_tiny_8b-ns"])
def golden(request: pytest.FixtureRequest) -> Golden:
    name, case = request.param.split("-")
    return load(f"{name}.safetensors", case)


@pytest.fixture(scope="session")
def official_tensors() -> Callable[[str], dict[str, list[int]]]:
    """Published tensor names and shapes of a tokenizer, without the quantiser's bit weights."""

    def read(name: str) -> dict[str, list[int]]:
        tensors = json.loads((SMALL / f"infinity_vae_{name}_keys.json").read_text())["tensors"]
        return {key: shape for key, (_, shape) in tensors.items() if not key.startswith(("quantizer.", "quantize."))}

    return read


@pytest.fixture
def small_tokenizer() -> BSQTokenizer:
    torch.manual_seed(0)
    return BSQTokenizer(
        bits=8, stride=8, patch=2, widths=(8, 16, 16, 24), encoder_blocks=1, decoder_blocks=1, norm_groups=8
    )


@pytest.fixture
def small_schedule() -> ScaleSchedule:
    return ScaleSchedule(((1, 1), (2, 2), (3, 4)), position_grid=(3, 4))
