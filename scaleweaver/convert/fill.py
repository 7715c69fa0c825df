"""Foreign tensors into a network of ours: all of them, each once, in the right shape, and nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scaleweaver.convert.keymap import Renamed
from scaleweaver.convert.read import shortened

Network = TypeVar("Network", bound=nn.Module)
# config field -> our tensor whose shape tells it, its number of axes, the axis
Sizes = Mapping[str, tuple[str, int, int]]


def read_sizes(weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, int]:
    """Config fields by the shapes of tensors; a field whose tensor is absent or has other axes is left out."""
    return {
        field: weights[name].shape[axis]
        for field, (name, axes, axis) in sizes.items()
        if name in weights and weights[name].ndim == axes
    }


def fill(build: Callable[[], Network], renamed: Renamed, source: Any, *, sized: bool = True) -> Network:
    """The network that `build` makes, with these tensors as its weights; they are not copied.

    sized: whether the sizes that `build` uses were read from them; else only names and numbers of axes are compared.
    """
    with torch.device("meta"):
        network = build()
    expected = network.state_dict()
    weights = {name: tensor for name, tensor in renamed.weights.items() if name in expected}
    missing = [name for name in expected if name not in weights]
    left_over = renamed.left_over + [renamed.official[name] for name in renamed.weights if name not in expected]
    wrong = [
        f"{renamed.official[name]} {_form(tensor)}, expected {_form(expected[name]) if sized else 'other axes'}"
        for name, tensor in weights.items()
        if not tensor.is_floating_point() or _differs(tensor, expected[name], sized)
    ]
    parts = [
        f"{title}: {shortened(names)} ({len(names)} in all)"
        for title, names in (("missing, under our names", missing), ("left over", left_over), ("wrong", wrong))
        if names
    ]
    if parts:
        raise ValueError(
            f"{source} does not fit {type(network).__name__}; {'; '.join(parts)}. Pass the complete, unchanged file"
        )
    network.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _differs(tensor: Tensor, wanted: Tensor, sized: bool) -> bool:
    return tensor.shape != wanted.shape if sized else tensor.ndim != wanted.ndim


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
