"""How far the results of a kernel lie from float64, beside those of plain torch in the same precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference in units of the exact norm."""
    assert found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_as_exact_as_torch(
    found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], floor: float | None = None
) -> None:
    """Each result errs at most twice as much as plain torch, whose error may by luck be below `floor`."""
    for index, (ours, theirs, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert ours.dtype == theirs.dtype
        allowed = 2 * max(relative_error(theirs, truth), floor or torch.finfo(ours.dtype).eps / 8)
        error = relative_error(ours, truth)
        assert error <= allowed, f"result {index}: error {error:.2e}, allowed {allowed:.2e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds nan, or the largest integer, until something is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # with which torch fills what it would leave as it is
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device=DEVICE).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
