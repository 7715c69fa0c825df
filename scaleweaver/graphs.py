"""A backbone whose calls are recorded once per scale and then replayed: one CUDA graph each.

A picture of the 2B model takes some ten thousand kernel launches, and at the coarse scales the host needs longer to
launch them than the GPU to run them. A graph is launched as a whole. It reads and writes fixed places in memory, so
what changes between calls is copied into buffers that stay: inputs, the prompt's context, what controls were encoded
to. The keys and values of earlier scales live in such buffers. A graph serves one combination of schedule, scale, rows,
length of the prompt, form of the controls and layers; all graphs share one pool of memory.

`GraphedBackbone` has the call of the backbone that it wraps and reaches the loop through a router. What it cannot
record it passes on to the backbone, and says why.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaleweaver.cache import FullCache, KVCache
from scaleweaver.contracts import Injector, Steps, TextContext
from scaleweaver.graph_buffers import Buffers, Call, Memory, address
from scaleweaver.kernels.key_ranges import forgotten
from scaleweaver.lora import lora_layers
from scaleweaver.reference import ReferenceInjector

logger = logging.getLogger(__name__)

Run = Callable[[], None]
Recorder = Callable[[Run], Run]  # what is done once -> what does it again


class CudaRecorder:
    """Records runs as CUDA graphs in one pool of memory, so no two of them may be replayed at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Run) -> Run:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            run()  # libraries set themselves up for this stream
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # what other threads allocate meanwhile is none of the recording
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class GraphedBackbone:
    """A backbone by its own call, replayed from graphs: `SingleModel(GraphedBackbone(backbone))` for the loop.

    most: graphs to keep, the longest unused are freed first; a picture of 13 scales takes 13. text_multiple: pad
    prompts to a multiple of so many tokens, so that prompts of nearby lengths share graphs; with 1 every length has its
    own, and the bits are those of the plain run. recorder: how a run becomes one that can be repeated; CUDA graphs
    unless given, and nothing on other devices.

    One picture at a time: what is asked for meanwhile runs on the plain backbone. `counts` tells recordings, replays
    and, by their reasons, the calls that were passed on.
    """

    def __init__(
        self, backbone: Any, *, most: int = 64, text_multiple: int = 1, recorder: Recorder | None = None
    ) -> None:
        if most < 1 or text_multiple < 1:
            raise ValueError(f"most is {most}, text_multiple is {text_multiple}; pass whole numbers from 1 on")
        self.backbone = backbone
        self.most = most
        self.text_multiple = text_multiple
        self.counts: Counter[str] = Counter()
        self._recorder = recorder
        self._own_recorder: Recorder | None = None
        self._memory = Memory()
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._failed: dict[Any, str] = {}
        self._recorded: tuple[Any, ...] = ()  # the backbone's weights and LoRAs as all graphs know them
        self._sources: dict[str, weakref.ref[Any]] = {}  # what buffers that outlive a scale were last filled from
        self._owner: weakref.ref[KVCache] | None = None  # whose keys and values the buffers hold
        self._lock = threading.Lock()

    @property
    def blocks(self) -> Any:
        """The blocks of the backbone, which the loop counts."""
        return self.backbone.blocks

    @property
    def kept(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    def nbytes(self) -> int:
        """Bytes of all buffers, without the pool that the graphs compute in."""
        return self._memory.nbytes()

    def clear(self) -> None:
        """Free all graphs and buffers."""
        with self._lock:
            self._forget()
            self._memory = Memory()

    def __call__(
        self,
        inputs: Tensor | None,
        steps: Steps,
        text: TextContext,
        cache: KVCache,
        *,
        injectors: Sequence[Injector] = (),
        layers: Sequence[int] | None = None,
        mix: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits (R, L, N) float32, as the backbone gives them."""
        found: Tensor | str = "another picture is being drawn"
        if self._lock.acquire(blocking=False):
            try:
                used = tuple(range(len(self.blocks)) if layers is None else layers)
                found = self._obstacle(steps, text, cache, injectors, used, mix) or ""
                if not found:
                    call = Call(inputs, steps[0], text, cache, tuple(injectors), used)  # type: ignore[arg-type]
                    found = self._replay(call)
            finally:
                self._lock.release()
        if isinstance(found, Tensor):
            self.counts["replays"] += 1
            return found
        if found not in self.counts:
            logger.warning("not run from a CUDA graph: %s", found)
        self.counts[found] += 1
        logits: Tensor = self.backbone(inputs, steps, text, cache, injectors=injectors, layers=layers, mix=mix)
        return logits

    def _obstacle(
        self,
        steps: Steps,
        text: TextContext,
        cache: KVCache,
        injectors: Sequence[Injector],
        layers: tuple[int, ...],
        mix: Callable[[int, Tensor], Tensor] | None,
    ) -> str | None:
        """Why this call cannot be a graph."""
        device = text.pooled.device
        if self._recorder is None and device.type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, the prompt is on {device}"
        if torch.is_grad_enabled():
            return "gradients are on, and a graph keeps nothing for the way back"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on: load the networks in the dtype to compute in"
        if self.backbone.training:
            return "the backbone is in training mode, where it may drop blocks at random; call eval()"
        if any(hasattr(part, hook) for part in self.backbone.modules() for hook in ("_hf_hook", "_diffusers_hook")):
            return "offloading moves the backbone, or parts of it, between devices"
        if len(steps) > 1:
            return "several scales at once"
        if type(cache.policy) is not FullCache:
            return f"the cache policy {type(cache.policy).__name__} decides anew what is kept"
        for injector in injectors:
            if type(injector) is not ReferenceInjector:
                return f"it is not known what a {type(injector).__name__} reads"
        probe = torch.zeros(len(text.pooled), 1, 1)
        if mix is not None and any(mix(layer, probe) is not probe for layer in layers):
            return "guidance acts inside the network"
        if any(cache.tokens(layer) != steps[0].start for layer in layers):
            return "the cache does not hold all earlier scales"
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not cache and any(owner.tokens(layer) for layer in layers):
            return "another picture is being drawn"
        return None

    def _replay(self, call: Call) -> Tensor | str:
        """Fill the buffers and repeat what was recorded for such a call; or why that is not possible."""
        self._follow_backbone(call.text)
        key = call.form(self.text_multiple)
        if key in self._failed:
            return self._failed[key]
        graph = self._graphs.get(key)
        if graph is None:
            try:
                graph = self._fresh(call)
            except torch.OutOfMemoryError as error:  # without graphs and buffers there may be room for a plain run
                failed = dict(self._failed)
                self._forget()
                self._memory, self._failed = Memory(), failed
                self._failed[key] = f"too little memory to record scale {call.step.index}: {error}".split("\n")[0]
                return self._failed[key]
            except RuntimeError as error:  # an operation that no graph can hold
                self._failed[key] = f"recording scale {call.step.index} failed: {error}".split("\n")[0]
                return self._failed[key]
            self._graphs[key] = graph
        else:
            graph.buffers.fill(call, self._sources)
        buffers = graph.buffers
        self._graphs.move_to_end(key)
        graph.replay()
        if buffers.kept(call.step):
            for layer, (k, v) in buffers.history.items():
                call.cache.resume(layer, k, v, call.step.stop)
        self._owner = weakref.ref(call.cache)
        return buffers.logits.clone()

    def _fresh(self, call: Call) -> Graph:
        """Buffers filled for this call, and a recording that reads them."""
        # ordinary tensors, those of torch's random states in a recording among them, serve with inference mode and
        # without it
        with torch.inference_mode(False), torch.no_grad():
            before = self._memory.replaced
            buffers = Buffers.take(self._memory, call, self.text_multiple, self.backbone.config["bits"])
            if self._memory.replaced != before:  # older graphs know a buffer that is gone
                self._forget()
            buffers.fill(call, self._sources)
            while len(self._graphs) >= self.most:
                self._free(self._graphs.popitem(last=False)[1])
            return self._record(call, buffers)

    def _record(self, call: Call, buffers: Buffers) -> Graph:
        step, layers = call.step, call.layers

        def run() -> None:  # holds buffers alone, nothing of the call that happened to be the first
            cache = KVCache()
            for layer, (k, v) in buffers.history.items():
                cache.resume(layer, k, v, step.start)
            logits = self.backbone(
                buffers.inputs, (step,), buffers.text, cache, injectors=buffers.injectors, layers=layers
            )
            buffers.logits.copy_(logits)
            for layer, places in buffers.history.items() if buffers.kept(step) else ():
                for place, known in zip(places, cache.history(layer) or (), strict=False):
                    if known.data_ptr() != place.data_ptr():  # it was not written in place
                        place[:, :, step.start : step.stop] = known[:, :, step.start :]

        with torch.cuda.device_of(buffers.logits):  # streams and pools are the current device's
            with Outliving() as read:
                run()
            recorder = self._recorder or self._own_recorder
            if recorder is None:
                recorder = self._own_recorder = CudaRecorder()
            # kernels get addresses, of which no operation of torch knows
            tables = [*self.backbone.rope((step,)), *(x for one in buffers.injectors for x in one.tables((step,)))]
            graph = Graph(recorder(run), buffers, [*read.tensors(), *tables])
        self.counts["recordings"] += 1
        return graph

    def _follow_backbone(self, text: TextContext) -> None:
        """Drop all graphs if the weights lie elsewhere than when they were recorded, or other LoRAs are on."""
        last = self._sources.get("text")
        fresh = last is None or last() is not text
        now = (_state(self.backbone) if fresh else self._recorded[0], forgotten())
        if now != self._recorded:
            self._forget()
            self._recorded = now

    def _forget(self) -> None:
        for graph in self._graphs.values():
            self._free(graph)
        self._graphs.clear()
        self._failed.clear()
        self._sources.clear()
        self._own_recorder = None  # the backbone may be on another device now

    def _free(self, graph: Graph) -> None:
        """A graph may be destroyed once the GPU is done with it."""
        if graph.buffers.logits.is_cuda:
            torch.cuda.synchronize(graph.buffers.logits.device)


def backbone_of(network: Any) -> Any:
    """The backbone that a network is or wraps."""
    return network.backbone if isinstance(network, GraphedBackbone) else network


@dataclass(frozen=True)
class Graph:
    """A recording, and what must live as long as it."""

    replay: Run
    buffers: Buffers
    read: list[Tensor]


class Outliving(TorchDispatchMode):
    """Collects the tensors that operations read and that outlive them: tables that a cache may drop, weights."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._seen[id(leaf)] = weakref.ref(leaf)
        return func(*args, **(kwargs or {}))

    def tensors(self) -> list[Tensor]:
        return [x for reference in self._seen.values() if (x := reference()) is not None]


def _state(backbone: Any) -> tuple[Any, ...]:
    """Where the weights of a backbone lie and which LoRAs act in it, and how much."""
    loras = tuple(
        (tuple(layer.active_adapters), tuple(layer.scaling.items()), layer.disable_adapters, *layer.merged_adapters)
        for _, layer in lora_layers(backbone)
    )
    return (tuple(address(x) for x in (*backbone.parameters(), *backbone.buffers())), loras)
