"""The places in memory that recorded calls of a backbone read and write: buffers that stay where they are.

A graph knows addresses, so what changes between calls is copied to them: inputs, the prompt's context, what controls
were encoded to, and the keys and values of earlier scales.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scaleweaver.cache import KVCache
from scaleweaver.contracts import TextContext
from scaleweaver.kernels.dispatch import runs_kernel
from scaleweaver.reference import ReferenceBank, ReferenceInjector
from scaleweaver.schedule import ScaleStep

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments of one scale."""

    inputs: Tensor | None
    step: ScaleStep
    text: TextContext
    cache: KVCache
    injectors: tuple[ReferenceInjector, ...]
    layers: tuple[int, ...]

    def form(self, text_multiple: int) -> tuple[Any, ...]:
        """All that a graph depends on but what the buffers hold."""
        keys = self.text.keys[0]
        masked = self.text.mask is not None or text_multiple > 1
        text = (len(self.text.pooled), _padded(keys.shape[2], text_multiple), masked, keys.dtype, keys.device)
        controls = tuple(_injector_form(injector, self.step) for injector in self.injectors)
        inputs = None if self.inputs is None else self.inputs.dtype
        return (self.step, self.layers, inputs, text, controls, runs_kernel(keys))


class Memory:
    """Flat buffers by name that stay where they are and grow when more is asked for."""

    def __init__(self) -> None:
        self.flat: dict[str, Tensor] = {}
        self.replaced = 0  # how often a buffer had to move

    def take(self, name: str, like: Tensor, shape: Sequence[int], spare: int = 0) -> Tensor:
        """The start of the buffer of this name as a tensor of this shape, of the dtype and on the device of `like`.

        A new buffer has room for `spare` numbers if that is more.
        """
        count, held = prod(shape), self.flat.get(name)
        if held is None or held.numel() < count or held.dtype != like.dtype or held.device != like.device:
            self.replaced += held is not None
            self.flat[name] = torch.empty(max(count, spare), dtype=like.dtype, device=like.device)
        return self.flat[name][:count].view(*shape)

    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self.flat.values())


@dataclass(frozen=True)
class Buffers:
    """The places that one graph reads and writes."""

    inputs: Tensor | None  # (R, L, N)
    text: TextContext
    injectors: tuple[ReferenceInjector, ...]
    history: Mapping[int, Pair]  # per layer, keys and values (R, H, capacity, D)
    logits: Tensor  # (R, L, N) float32

    @classmethod
    def take(cls, memory: Memory, call: Call, text_multiple: int, bits: int) -> Buffers:
        text, step = call.text, call.step
        rows, heads, prompt, width = text.keys[0].shape
        capacity = step.schedule.steps[-1].start  # nobody reads the last scale again
        widest = rows * bits * max(each.n for each in step.schedule)  # room for all scales from the first on
        history = {
            layer: (
                memory.take(f"keys {layer}", text.keys[0], (rows, heads, capacity, width)),
                memory.take(f"values {layer}", text.keys[0], (rows, heads, capacity, width)),
            )
            for layer in call.layers
        }
        inputs = memory.take(
            "inputs", text.pooled if call.inputs is None else call.inputs, (rows, step.n, bits), widest
        )
        return cls(
            inputs=None if call.inputs is None else inputs,
            text=_text_buffers(memory, text, _padded(prompt, text_multiple), text_multiple > 1),
            injectors=tuple(_injector_buffers(memory, i, one) for i, one in enumerate(call.injectors)),
            history=history,
            logits=memory.take("logits", text.pooled.float(), (rows, step.n, bits), widest),
        )

    def kept(self, step: ScaleStep) -> bool:
        """Whether the keys and values of this scale go into the buffers."""
        return all(step.stop <= k.shape[2] for k, _ in self.history.values())

    def fill(self, call: Call, sources: dict[str, weakref.ref[Any]]) -> None:
        """Copy what the call brings, and of that which is the same for several scales what `sources` does not know."""
        if self.inputs is not None and call.inputs is not None:
            self.inputs.copy_(call.inputs)
        if _new(sources, "text", call.text):
            _fill_text(self.text, call.text)
        for index, (mine, given) in enumerate(zip(self.injectors, call.injectors, strict=True)):
            if _new(sources, f"bank {index}", given.bank):
                for layer in given.bank.values:
                    mine.bank.keys[layer].copy_(given.bank.keys[layer])
                    mine.bank.values[layer].copy_(given.bank.values[layer])
            if _new(sources, f"control {index}", given):
                mine.weights.copy_(given.weights)
        for layer, places in self.history.items():
            for place, known in zip(places, call.cache.history(layer) or (), strict=False):
                if known.data_ptr() != place.data_ptr():
                    place[:, :, : call.step.start] = known


def _new(sources: dict[str, weakref.ref[Any]], name: str, source: Any) -> bool:
    """Whether a group of buffers holds something else than this source; from now on it holds it."""
    held = sources.get(name)
    if held is not None and held() is source:
        return False
    sources[name] = weakref.ref(source)
    return True


def _padded(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def _text_buffers(memory: Memory, text: TextContext, tokens: int, masked: bool) -> TextContext:
    rows, heads, _, width = text.keys[0].shape
    shape = (rows, heads, tokens, width)
    # prompts vary in length: room for up to the next power of two spares the graphs most moves
    spare = rows * heads * width << (tokens - 1).bit_length()
    keys, values = (
        [memory.take(f"text {name} {layer}", x, shape, spare) for layer, x in enumerate(given)]
        for name, given in (("keys", text.keys), ("values", text.values))
    )
    mask = None
    if masked or text.mask is not None:
        mask = memory.take(
            "text mask", torch.empty(0, dtype=torch.bool, device=text.pooled.device), (rows, 1, 1, tokens)
        )
    return TextContext(
        pooled=memory.take("pooled", text.pooled, text.pooled.shape),
        modulation=memory.take("modulation", text.modulation, text.modulation.shape),
        keys=keys,
        values=values,
        mask=mask,
    )


def _fill_text(mine: TextContext, given: TextContext) -> None:
    mine.pooled.copy_(given.pooled)
    mine.modulation.copy_(given.modulation)
    tokens = given.keys[0].shape[2]
    for places, source in ((mine.keys, given.keys), (mine.values, given.values)):
        for place, x in zip(places, source, strict=True):
            place[:, :, :tokens] = x
            place[:, :, tokens:].zero_()  # what is masked counts 0 times, and 0 times nan is nan
    if mine.mask is not None:
        mine.mask.zero_()
        mine.mask[..., :tokens] = True if given.mask is None else given.mask


def _injector_form(injector: ReferenceInjector, step: ScaleStep) -> tuple[Any, ...]:
    """What of an injector a graph depends on: of the strengths, which lie in a buffer, whether they are zero."""
    reader, bank = injector.reader, injector.bank
    weights = tuple(address(x) for x in reader.parameters()) if isinstance(reader, nn.Module) else ()
    first = next(iter(bank.values.values()))
    acts = (bool(injector.strengths[step.index]), any(injector.strengths))
    bank_form = (bank.schedule, tuple(bank.values), first.shape, first.dtype)
    return (id(reader), weights, bank_form, injector.weights.shape, injector.rows, acts)


def _injector_buffers(memory: Memory, index: int, injector: ReferenceInjector) -> ReferenceInjector:
    """The injector with buffers in place of its bank and its weights."""
    bank = injector.bank
    keys, values = (
        {layer: memory.take(f"control {index} {name} {layer}", x, x.shape) for layer, x in given.items()}
        for name, given in (("keys", bank.keys), ("values", bank.values))
    )
    mine = copy.copy(injector)
    mine.bank = ReferenceBank(keys, values, bank.schedule)
    mine.weights = memory.take(f"control {index} weights", injector.weights, injector.weights.shape)
    return mine


def address(x: Tensor) -> Any:
    """Where a tensor lies; a quantised one lies in several pieces."""
    if not is_traceable_wrapper_subclass(x):
        return x.data_ptr()
    return tuple(address(getattr(x, name)) for name in x.__tensor_flatten__()[0])
