"""The loop over scales without its numbers: what each scale multiplies, remembers and holds in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from scaleweaver.cache import FullCache, KVCache
from scaleweaver.contracts import Route, Steps
from scaleweaver.dry_run import CacheEstimate, DryRun, Reference, ScaleCost, SearchEstimate, fuses_all
from scaleweaver.evaluate.memory import dry_peak_bytes
from scaleweaver.graphs import backbone_of
from scaleweaver.masks import key_ranges
from scaleweaver.reference import ReferenceInjector, reference_ranges
from scaleweaver.schedule import ScaleStep
from scaleweaver.work import bare_text, block_flops, head_flops, pairs, products, text_bytes, token_bytes


@torch.no_grad()
def count(run: DryRun) -> None:
    """Fill in what a whole call takes."""
    steps = run.plan.steps[: run.scales]
    routes = [run.router.route(step) for step in steps]
    network = backbone_of(routes[0].backbone)
    held = run.prepare(network)
    loop = DryLoop(
        run=run, network=network, images=run.images, rows=run.rows, held=held, injectors=run.injectors(run.images)
    )
    loop.draw(steps, routes)
    run.decode(held, loop.images)


@dataclass(kw_only=True)
class DryLoop:
    """Where the loop stands: the network, the pictures and rows that go on, what is held for them."""

    run: DryRun
    network: Any
    images: int
    rows: int
    held: int  # bytes of texts and controls
    injectors: list[ReferenceInjector]
    history: dict[int, int] = field(default_factory=dict)  # tokens that each layer remembers

    def draw(self, steps: Steps, routes: Sequence[Route]) -> None:
        run, search = self.run, self.run.search
        for step, route in zip(steps, routes, strict=True):
            now = self._change_network(steps[: step.index + 1], route)
            self._drop_rows(step)
            self._scale(now, route, routes[step.index + 1 :])
            run.decodes += run.previews * self.images
            if isinstance(search, SearchEstimate):
                self._select(search, step)
        if search is not None and not isinstance(search, SearchEstimate):
            run.uncounted.append(f"what {type(search).__name__} decodes, and that it may stop some pictures")

    def _change_network(self, so_far: Steps, route: Route) -> Steps:
        """The scales that run now: the next one, and on a network that is new all before it."""
        network = backbone_of(route.backbone)
        if network is self.network:
            return so_far[-1:]
        self.network, self.history = network, {}
        self.run.read_texts(network, self.held)
        return so_far

    def _drop_rows(self, step: ScaleStep) -> None:
        """The rows that go on are copied out of all rows."""
        alive = self.run.guidance.alive(step) * self.images
        if alive == self.rows:
            return
        text = text_bytes(self.network, rows=alive, prompt=self.run.longest)
        kept = alive * token_bytes(self.network) * sum(self.history.values())
        held = self.held + self._cache_bytes(self.history)
        self.run.stage("scales", "transformer", held=held, between=kept + text)
        self.held += text
        self.rows = alive

    def _scale(self, now: Steps, route: Route, later: Sequence[Route]) -> None:
        run, layers = self.run, tuple(range(len(self.network.blocks)) if route.layers is None else route.layers)
        work = self._flops(now, layers)
        before = dict(self.history)
        self._commit(now, layers)
        for stale in _unused(later, self.network):
            self.history.pop(stale, None)
        size = self.rows * token_bytes(self.network)
        read, remembered = (size * sum(history.values()) for history in (before, self.history))
        own = size * (before.get(layers[-1], 0) + sum(step.n for step in now))
        run.kv_bytes = max(run.kv_bytes, read, remembered)
        run.kv_peak_bytes = max(run.kv_peak_bytes, read + own)
        run.costs.append(
            ScaleCost(
                step=now[-1],
                rows=self.rows,
                history=sum(before.get(layer, 0) for layer in layers) // len(layers),
                flops=work,
                kv_bytes=remembered,
                activation_bytes=max(self._layer(now, layer, before) for layer in self._kinds(layers)),
            )
        )

    def _select(self, search: SearchEstimate, step: ScaleStep) -> None:
        self.run.decodes += search.decodes(step, self.images)
        left = search.population(step, self.images)
        if left != self.images:
            self.rows, self.images = self.rows // self.images * left, left
            self.injectors = self.run.injectors(left)

    # memory

    def _layer(self, now: Steps, layer: int, before: Mapping[int, int]) -> int:
        """The most that a layer holds in between, which is a moment of the stage."""
        run, bits = self.run, self.network.config["bits"]
        height, width = run.latent_grid
        latents = self.images * run.vae.config["bits"] * height * width * 4
        inputs = self.rows * sum(step.n for step in now) * bits * 4
        codes = self.images * now[-1].stop * bits
        cache = self._cache_bytes({**before, **self.history, layer: before.get(layer, 0)})
        used = self._activations(now, layer, before.get(layer, 0))
        run.stage("scales", "transformer", held=self.held + cache + latents + inputs + codes, between=used)
        return used

    def _activations(self, now: Steps, layer: int, past: int) -> int:
        """The network run with this layer alone."""
        run, network, rows = self.run, self.network, self.rows
        bare = run.bare(network)
        text = bare_text(bare, rows=rows, prompt=run.longest, masked=len(set(run.texts)) > 1)
        cache = KVCache(run.policy)
        heads, width = network.config["heads"], network.config["width"]
        room = run.plan.steps[-1].start if self._in_place else past
        if room and len(now) == 1:
            k, v = (text.keys[0].new_empty(rows, heads, room, width // heads) for _ in "kv")
            cache.resume(layer, k, v, past)
        tokens = sum(step.n for step in now if step.index > 0)
        inputs = torch.empty(rows, tokens, network.config["bits"], device="meta") if tokens else None
        alive = [one.select_rows(torch.arange(rows)) for one in self.injectors if self._acting]
        return dry_peak_bytes(
            lambda: bare(inputs, now, text, cache, injectors=alive, layers=(layer,)),
            fused_gelu=fuses_all(network, [layer]),
        )

    def _cache_bytes(self, history: Mapping[int, int]) -> int:
        """The cache's memory while it knows so much; one that keeps all has room for the whole from the start."""
        room = self.run.plan.steps[-1].start * len(history) if self._in_place else sum(history.values())
        return self.rows * token_bytes(self.network) * room

    @property
    def _in_place(self) -> bool:
        return type(self.run.policy) is FullCache

    @property
    def _acting(self) -> Sequence[Reference]:
        """Controls work on the network that they were made for."""
        return self.run.references if self.network is self.run.transformer else ()

    def _kinds(self, layers: Iterable[int]) -> list[int]:
        """One layer of each kind: they differ in whether they read controls, and in what is one kernel."""
        reading = {block for one in self._acting for block in one.adapter.blocks}
        return sorted({(layer in reading, fuses_all(self.network, [layer])): layer for layer in layers}.values())

    def _commit(self, now: Steps, layers: Sequence[int]) -> None:
        """What every layer remembers after a scale, as the policy says."""
        step, policy, history = now[-1], self.run.policy, self.history
        if step.is_last:
            return
        added = sum(each.n for each in now if policy.commits(each))
        for layer in layers:
            observed = policy.queries(layer, step)
            tokens = history.get(layer, 0) + added
            if observed is not None:
                seen = history.get(layer, 0) + sum(each.n for each in now)
                self.run.flops["cache scores"] += 2 * self.rows * len(observed) * seen * self.network.config["width"]
            if not added:
                continue
            if isinstance(policy, CacheEstimate):
                tokens = policy.kept(layer, step, tokens)
            elif observed is not None:
                raise ValueError(
                    f"{type(policy).__name__} chooses by attention scores, which only a run knows; give it a "
                    "method kept(layer, step, tokens) that says how many it keeps"
                )
            else:
                index = policy.keep(layer, step, tokens, None)
                tokens = tokens if index is None else index.shape[-1]
            history[layer] = tokens

    # work

    def _flops(self, now: Steps, layers: Sequence[int]) -> int:
        network, rows, width = self.network, self.rows, self.network.config["width"]
        tokens = sum(step.n for step in now)
        embedded = sum(step.n for step in now if step.index > 0)  # the first scale reads the text alone
        work: dict[str, int] = defaultdict(int)
        work["linear layers"] += rows * embedded * products(network.code_embed)
        for layer in layers:
            past = self.history.get(layer, 0)
            ranges = key_ranges(now, "block_causal", past) if len(now) > 1 else None
            work["linear layers"] += rows * tokens * block_flops(network.blocks[layer])
            work["self-attention"] += 4 * rows * pairs(ranges, tokens, past + tokens) * width
            work["cross-attention"] += 4 * rows * tokens * self.run.longest * width
        for place, one in enumerate(self._acting):
            if any(one.strengths[step.index] for step in now):
                work["reference attention"] += self._reference_flops(now, layers, place)
        work["head"] += head_flops(network, rows=rows, tokens=tokens)
        for kind, amount in work.items():
            self.run.flops[kind] += amount
        return sum(work.values())

    def _reference_flops(self, now: Steps, layers: Sequence[int], place: int) -> int:
        """Of the rows that see a control: its keys, and Z where it has one."""
        adapter, tokens = self.run.references[place].adapter, sum(step.n for step in now)
        readers = sum(self.run.guidance.sees_control(place)[: self.rows // self.images]) * self.images
        keys = now[-1].stop - (now[0].start if adapter.scope == "same" else 0)
        seen = pairs(reference_ranges(now, adapter.scope), tokens, keys)
        work = 0
        for layer in set(layers) & set(adapter.blocks):
            work += 4 * readers * seen * int(self.network.config["width"])
            if adapter.fusion == "separate":
                work += readers * tokens * products(adapter.z[str(layer)])
        return work


def _unused(later: Sequence[Route], network: Any) -> set[int]:
    """Layers of `network` that no later scale runs, whose history the loop forgets."""
    used: set[int] = set()
    for route in later:
        if backbone_of(route.backbone) is not network:
            break
        if route.layers is None:
            return set()
        used.update(route.layers)
    return set(range(len(network.blocks))) - used if later else set()
