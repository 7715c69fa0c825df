"""Networks of a recipe compiled by torch.compile, in place: names, weights and files are those of a run without."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

VARIANTS = 64  # of one piece of code: every layer is one, and so is every kind of shape


@runtime_checkable
class Compilable(Protocol):
    """A recipe that says which parts of its model are worth compiling; of others it is the model."""

    def networks(self) -> Iterable[nn.Module]: ...


def compile_networks(recipe: Any, backend: str) -> None:
    """Compiles with a backend of torch.compile; "" compiles nothing."""
    if not backend:
        return
    known = sorted(torch.compiler.list_backends(exclude_tags=()))
    if backend not in known:
        raise ValueError(f"compile is {backend!r}; expected one of {', '.join(known)}, or nothing")
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    for network in recipe.networks() if isinstance(recipe, Compilable) else [recipe.model]:
        network.compile(backend=backend)  # unlike torch.compile(network), which would rename all weights


def uncompiled(backend: str) -> AbstractContextManager[Any]:
    """Within the block nothing compiled runs, and nothing is compiled: pictures are drawn in shapes of their own."""
    return torch.compiler.set_stance("force_eager") if backend else nullcontext()
