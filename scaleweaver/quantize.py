"""Weights of eight bits for the blocks of a backbone, through torchao: half the memory of bfloat16.

Every row of a weight gets a scale of its own, activations keep their format. Embeddings, modulation and head stay as
they are: small, and every bit of a picture depends on them. So do LoRAs, of controls and of the image.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

from torch import nn

FORMATS = ("int8",)


def check_format(name: str) -> None:
    """Whether `quantize` can do this; loads nothing."""
    if name not in FORMATS:
        raise ValueError(f"quantisation {name!r} is unknown; pass {' or '.join(map(repr, FORMATS))}")
    if find_spec("torchao") is None:
        raise ValueError(f'{name} weights need torchao; run pip install "scaleweaver[int8]"')


def quantize(backbone: Any, name: str = "int8") -> None:
    """Round the linear layers of all blocks, those inside LoRAs too, in place; there is no way back.

    What is quantised draws but does not learn.
    """
    check_format(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels for GPUs that torchao looks for
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(backbone, Int8WeightOnlyConfig(), _is_wide)


def _is_wide(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and path.startswith("blocks.") and ".lora_" not in path
