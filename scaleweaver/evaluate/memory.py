"""How much memory tensors take, counted by the storages that are alive: the same number in every run, unlike that of
the operating system. On tensors of the meta device it tells what a computation would take without doing it.

What a kernel takes for itself and gives back before it returns is not seen, nor what an allocator keeps for later.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class MemoryTracker(TorchDispatchMode):
    """While it is on: bytes of the tensors that operations made and that are alive, now and at the most.

    Tensors from before are not counted, views are none of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)]
        if made:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for storage in {storage._cdata: storage for storage in made if storage._cdata not in given}.values():
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
            self.peak = max(self.peak, self.live)
        return result

    def _freed(self, nbytes: int) -> None:
        self.live -= nbytes


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that `run` holds at once in tensors of its own, its result among them."""
    tracker = MemoryTracker()
    with tracker:
        run()
    return tracker.peak


def dry_peak_bytes(run: Callable[[], Any], *, fused_gelu: bool = False) -> int:
    """`peak_bytes` of a computation on the meta device, where attention keeps no scores, as on other devices.

    fused_gelu: GELU takes no memory, as where it is one kernel with the layer before it.
    """
    with _Fused(fused_gelu):
        return peak_bytes(run)


def nbytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, those of quantised weights as they lie in memory."""
    return sum(_nbytes(x) for x in {id(x): x for x in (*module.parameters(), *module.buffers())}.values())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors keep alive: all of the memory that each is a view of."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def without_storage(module: T) -> T:
    """A copy of a module whose parameters and buffers have shapes and dtypes but no memory: on the meta device."""
    assert isinstance(module, nn.Module)
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)  # offloading has nothing to move here
        if hook is not None:
            memo[id(hook)] = None
    bare = copy.deepcopy(module, memo)
    for part in bare.modules():
        if hasattr(part, "_hf_hook"):
            part.forward = part._old_forward  # type: ignore[assignment]
            del part._hf_hook
    return bare


def _nbytes(tensor: Tensor) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_nbytes(getattr(tensor, name)) for name in names)


class _Fused(TorchFunctionMode):
    """torch has no fused kernels for the meta device: it would write out scores, and what the others pass on."""

    def __init__(self, gelu: bool) -> None:
        super().__init__()
        self.gelu = gelu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.gelu and self.gelu:
            return args[0]
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, _, v = args[:3]
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(q.dtype)  # as torch does before it calls a fused kernel
        return q.new_empty(*q.shape[:-1], v.shape[-1])
