"""The loop over scales: read the running latent, predict the codes of a scale, add them, go on with the next scale.

Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction (arXiv 2404.02905). The loop knows
only the protocols of contracts.py: which network (router), how branches mix (guidance), how logits become codes
(sampler), how codes become the latent (target), which images go on (search) and what the cache keeps (policy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scaleweaver.cache import FullCache, KVCache
from scaleweaver.contracts import (
    CachePolicy,
    Conditions,
    Guidance,
    LoopOutput,
    Route,
    Router,
    Sampler,
    SamplerState,
    Search,
    Steps,
    Target,
)
from scaleweaver.schedule import ScaleSchedule, ScaleStep


@dataclass(frozen=True)
class SingleModel:
    """The plain router: one network draws every scale, with all its layers unless `layers` names some."""

    backbone: Any
    layers: tuple[int, ...] | None = None

    def route(self, step: ScaleStep) -> Route:
        return Route(self.backbone, self.layers)


@torch.inference_mode()
def generate(
    conditions: Conditions,
    schedule: ScaleSchedule,
    *,
    router: Router,
    target: Target,
    guidance: Guidance,
    sampler: Sampler,
    search: Search | None = None,
    policy: CachePolicy | None = None,
    forced: Sequence[Tensor] | None = None,
    stop_after: int | None = None,
    on_scale: Callable[[ScaleStep, SamplerState], None] | None = None,
    conditions_for: Callable[[Any], Conditions] | None = None,
) -> LoopOutput:
    """Draw the codes of all scales, or of the first `stop_after` (the latent then lacks the rest).

    forced: codes (B, n, N) that replace the drawn ones at the leading scales. on_scale: called after each scale;
    `state.latent` can be decoded for a preview. conditions_for: the conditions of another network, rows as in
    `conditions`; needed when the router changes networks, which hands over codes and never keys and values.
    """
    steps, forced = _check(schedule, conditions, guidance, stop_after, list(forced or ()))
    routes = [router.route(step) for step in steps]
    device = conditions.text.pooled.device
    latent = target.initial(conditions.images, schedule, device=device, dtype=torch.float32)
    state = SamplerState(latent, list(conditions.generators), KVCache(policy or FullCache()), conditions)
    # host tensors: which rows go on is known without asking the device, which may be far behind
    rows = torch.arange(conditions.branches * conditions.images)  # where each row was at the start
    forced = [given.to(device) for given in forced]
    network = routes[0].backbone
    for step, route in zip(steps, routes, strict=True):
        now: Steps = (step,)
        if route.backbone is not network:  # a fresh network reads all scales so far in one masked pass
            network, now = route.backbone, steps[: step.index + 1]
            _hand_over(state, network, rows, conditions_for)
        if guidance.alive(step) < state.conditions.branches:
            rows = rows[_select(state, guidance.alive(step))]
        inputs, text, injectors = _read(target, state, now), state.conditions.text, state.conditions.injectors
        logits = network(
            inputs, now, text, state.cache, injectors=injectors, layers=route.layers, mix=_mixer(guidance, now)
        )[:, -step.n :]  # (R, L, N)
        _free_layers(state.cache, routes[step.index + 1 :], network)
        # drawn even where codes are forced: the random stream of later scales does not depend on what was forced
        codes = sampler.sample(guidance.combine(logits.float(), step), step, state.generators)  # (B, L, N)
        if step.index < len(forced):
            codes = forced[step.index].to(codes)
        state.codes.append(codes)
        state.latent = target.absorb(state.latent, codes, step)
        if on_scale is not None:
            on_scale(step, state)
        survivors = None if search is None else search.select(state, step)
        if survivors is not None:
            rows = rows[_select(state, state.conditions.branches, survivors.cpu())]
            forced = [given[survivors.to(given.device)] for given in forced]
    state.cache.reset()
    return LoopOutput(state.latent, state.codes)


def _check(
    schedule: ScaleSchedule, conditions: Conditions, guidance: Guidance, stop_after: int | None, forced: list[Tensor]
) -> tuple[tuple[ScaleStep, ...], list[Tensor]]:
    stop = len(schedule) if stop_after is None else stop_after
    if not 1 <= stop <= len(schedule):
        raise ValueError(f"stop_after is {stop_after}; pass a number of scales from 1 to {len(schedule)}")
    if conditions.branches < guidance.branches:
        raise ValueError(
            f"the conditions hold {conditions.branches} branches but the guidance mixes {guidance.branches}; "
            f"build them with branches={guidance.branches}"
        )
    if len(conditions.generators) != conditions.images:
        raise ValueError(f"{len(conditions.generators)} generators for {conditions.images} images; pass one per image")
    if len(forced) > len(schedule):
        raise ValueError(f"forced holds {len(forced)} scales; the schedule has {len(schedule)}")
    for step, codes in zip(schedule.steps, forced, strict=False):
        if codes.ndim != 3 or codes.shape[:2] != (conditions.images, step.n):
            raise ValueError(
                f"forced codes of scale {step.index} have shape {tuple(codes.shape)}; "
                f"expected ({conditions.images}, {step.n}, N) in transformer layout"
            )
    return schedule.steps[:stop], forced


def _read(target: Target, state: SamplerState, steps: Steps) -> Tensor | None:
    """Inputs (R, T, N) of all `steps` but a first scale, equal in all branches; None if only that is left."""
    if len(steps) == 1:
        maps = [target.next_input(state.latent, step) for step in steps if step.index > 0]
    else:  # after a change of networks the earlier inputs are made again from the codes
        maps = []
        old = state.latent
        latent = target.initial(len(old), steps[0].schedule, device=old.device, dtype=old.dtype)
        for codes, done, step in zip(state.codes, steps, steps[1:], strict=False):
            latent = target.absorb(latent, codes, done)
            maps.append(target.next_input(latent, step))
    return torch.cat(maps, dim=1).repeat(state.conditions.branches, 1, 1) if maps else None  # (R, T, N)


def _mixer(guidance: Guidance, steps: Steps) -> Callable[[int, Tensor], Tensor]:
    """Guidance inside the network for the tokens of several scales, each with the weights of its own scale."""
    if len(steps) == 1:
        return lambda layer, x: guidance.mix(layer, x, steps[0])
    # a scale that had more branches than are left cannot be mixed any more: its kept rows pass as they are
    alive = guidance.alive(steps[-1])

    def mix(layer: int, x: Tensor) -> Tensor:
        parts = x.split([step.n for step in steps], dim=1)
        mixed = [
            guidance.mix(layer, part, step) if guidance.alive(step) == alive else part
            for part, step in zip(parts, steps, strict=True)
        ]
        return torch.cat(mixed, dim=1)  # (R, T, C)

    return mix


def _select(state: SamplerState, branches: int, survivors: Tensor | None = None) -> Tensor:
    """Keep the leading branches everywhere, of all images or of the survivors; returns the kept rows (branches * B',),
    like `survivors` (B',) on the host.
    """
    old, device = state.conditions, state.latent.device
    images = torch.arange(old.images) if survivors is None else survivors
    rows = torch.cat([images + branch * old.images for branch in range(branches)])
    # leading branches of all images are the leading rows
    there = torch.arange(len(rows), device=device) if survivors is None else rows.to(device)
    state.conditions = replace(
        old,
        text=old.text.select_rows(there),
        injectors=tuple(injector.select_rows(rows) for injector in old.injectors),
        branches=branches,
        images=len(images),
    )
    state.cache.select_rows(there)
    if survivors is not None:
        chosen = survivors.to(device)
        state.latent = state.latent[chosen]
        state.codes = [codes[chosen] for codes in state.codes]
        state.generators = _survivors(state.generators, survivors.tolist())
    return rows


def _survivors(generators: Sequence[torch.Generator], images: Sequence[int]) -> list[torch.Generator]:
    """The first copy of an image goes on with its own stream, every further copy with a new one derived from it."""
    chosen: list[torch.Generator] = []
    forks: dict[int, torch.Generator] = {}
    for image in images:
        parent = generators[image]
        if image not in forks:
            forks[image] = parent.clone_state()  # seeds are drawn from a copy: the parent's stream stays untouched
            chosen.append(parent)
        else:
            seed = torch.randint(2**62, (), generator=forks[image], device=parent.device)
            chosen.append(torch.Generator(parent.device).manual_seed(int(seed)))
    return chosen


def _hand_over(
    state: SamplerState, network: Any, rows: Tensor, conditions_for: Callable[[Any], Conditions] | None
) -> None:
    """Give the state to another network: its own conditions for the rows that are left, an empty cache."""
    if conditions_for is None:
        raise ValueError("the router changes networks but the new one has no conditions; pass conditions_for=")
    own = conditions_for(network)
    state.cache.reset()
    state.conditions = replace(
        state.conditions,
        text=own.text.select_rows(rows.to(own.text.pooled.device)),
        injectors=tuple(injector.select_rows(rows) for injector in own.injectors),
    )


def _free_layers(cache: KVCache, later: Sequence[Route], network: Any) -> None:
    """Drop the history of layers that no later scale reads."""
    used: set[int] = set()
    for route in later:
        if route.backbone is not network:
            break
        if route.layers is None:
            return
        used.update(route.layers)
    stale = set(range(len(network.blocks))) - used
    if later and stale:
        cache.drop_layers(stale)
