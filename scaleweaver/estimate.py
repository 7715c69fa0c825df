"""Memory and work of a call, told before it runs: keys and values, weights, activations, products, decodes.

No weights are needed: a pipeline on the meta device will do. Figures hold for the torch references; kernels need less
memory in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from scaleweaver.cache import FullCache
from scaleweaver.contracts import CachePolicy, Control, Router, Search, Steps, TextFeatures
from scaleweaver.control_images import EncodedControl, acts, control_strengths, settle
from scaleweaver.dry_loop import count
from scaleweaver.dry_run import DryRun, Reference, ScaleCost
from scaleweaver.evaluate.memory import nbytes
from scaleweaver.graphs import backbone_of
from scaleweaver.images import read_image
from scaleweaver.loop import SingleModel
from scaleweaver.methods.scaleweaver import ControlAdapter
from scaleweaver.request import check_call, read_guidance, read_numbers
from scaleweaver.schedule import ScaleSchedule

MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """What a call will take. Bytes unless said otherwise.

    kv_bytes: the most keys and values that are remembered, the history before the last scale; kv_peak_bytes with the
    last scale's own beside it. bank_bytes: encoded controls, by kind. text_bytes: what the backbone derives from the
    prompts. weights: by component. activations: by stage, the most held in between, and memory: with all that is held
    then. flops: by kind of work. uncounted: what the figures leave out.
    """

    schedule: ScaleSchedule
    images: int
    branches: int
    dtype: torch.dtype
    weights: Mapping[str, int]
    text_bytes: int
    bank_bytes: Mapping[str, int]
    kv_bytes: int
    kv_peak_bytes: int
    activations: Mapping[str, int]
    memory: Mapping[str, int]
    flops: Mapping[str, int]
    decodes: int
    scales: tuple[ScaleCost, ...]
    uncounted: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return max(self.memory.values())

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        pictures = "1 picture" if self.images == 1 else f"{self.images} pictures"
        tokens = sum(scale.tokens for scale in self.scales)
        lines = [
            f"{pictures} of {self.schedule.width}x{self.schedule.height}, {self.branches} guidance branches, {name}",
            f"{len(self.scales)} scales, {tokens} tokens, {sum(scale.tokens * scale.rows for scale in self.scales)} "
            f"token rows, {self.decodes} decodes",
            "",
            *_table("memory", "MiB", {
                **{f"weights, {part}": size / MIB for part, size in self.weights.items()},
                "prompt, keys and values": self.text_bytes / MIB,
                **{f'control "{kind}"': size / MIB for kind, size in self.bank_bytes.items()},
                "keys and values": self.kv_bytes / MIB,
                "keys and values, last scale": self.kv_peak_bytes / MIB,
                **{f"peak, {stage}": size / MIB for stage, size in self.memory.items()},
                "peak": self.peak_bytes / MIB,
            }),
            "",
            *_table("work", "GFLOP", {
                **{kind: work / 1e9 for kind, work in self.flops.items()}, "all": self.total_flops / 1e9,
            }),
            *[f"not counted: {what}" for what in self.uncounted],
        ]  # fmt: skip
        return "\n".join(lines)


def _table(title: str, unit: str, rows: Mapping[str, float]) -> list[str]:
    return [f"{title:34}{unit:>12}", *(f"  {name:32}{value:12,.1f}" for name, value in rows.items())]


def kv_bytes(tokens: int, *, layers: int, width: int, rows: int = 1, key_bytes: int = 2, value_bytes: int = 2) -> int:
    """Keys and values of a history of `tokens` tokens; rows are guidance branches times images.

    Papers count key_bytes=4, value_bytes=2: the original keeps keys in float32.
    """
    return layers * width * tokens * rows * (key_bytes + value_bytes)


def read_references(
    control: Any, adapters: Mapping[str, ControlAdapter], reused: bool
) -> tuple[list[tuple[Control, bool]], tuple[int, int] | None]:
    """`control=` of an estimate: each control, whether it is to be encoded, and the size of the first picture.

    In addition to what a call takes: names of controls, and None in place of a picture.
    """
    if isinstance(control, str):
        control = [control]
    if isinstance(control, Mapping):
        control = [replace(v, kind=k) if isinstance(v, Control) else Control(k, v) for k, v in control.items()]
    given = [control] if isinstance(control, Control) else list(control or ())
    found, size = [], None
    for one in (Control(item, None) if isinstance(item, str) else item for item in given):
        if not isinstance(one, Control) or one.kind not in adapters:
            what = f'"{one.kind}"' if isinstance(one, Control) else repr(one)
            raise ValueError(f"control {what} is not loaded; there is {', '.join(adapters) or 'none'}")
        images = list(one.image) if isinstance(one.image, list | tuple) else [one.image]
        encoded = bool(images) and all(isinstance(image, EncodedControl) for image in images)
        if size is None and encoded:
            size = images[0].schedule.height, images[0].schedule.width
        elif size is None and images and images[0] is not None:
            picture = read_image(images[0], f'control "{one.kind}" image')
            size = picture.height, picture.width
        count = sum(map(len, images)) if encoded else len(images)
        masks = one.mask if isinstance(one.mask, list | tuple) else None if one.mask is None else [one.mask]
        found.append((replace(one, image=[None] * count, mask=masks and list(map(read_image, masks))), not encoded))
    return [(one, fresh and not reused) for one, fresh in found], size


def references(
    given: Sequence[tuple[Control, bool]],
    adapters: Mapping[str, ControlAdapter],
    plan: ScaleSchedule,
    prompts: int,
) -> tuple[list[Control], list[Reference]]:
    """The controls settled for a schedule, and those of them that act."""
    settled = [(settle(one, plan, prompts), fresh) for one, fresh in given]
    active = [
        Reference(one, adapters[one.kind], len(one.image), fresh, control_strengths(one, plan))
        for one, fresh in sorted(settled, key=lambda pair: pair[0].kind)
        if acts(one, plan)
    ]
    return [one for one, _ in settled], active


def estimate(
    pipe: Any,
    prompt: str | int | Sequence[str | int] | None,
    *,
    control: Any,
    reused: bool,
    negative_prompt: str | int | Sequence[str | int] | None,
    height: int | None,
    width: int | None,
    guidance_scale: Any,
    control_guidance_scale: Any,
    guidance_layer: int | None,
    num_images_per_prompt: int,
    schedule: Any,
    cache: CachePolicy | None,
    router: Router | None,
    search: Search | None,
    prompt_embeds: Any,
    stop_after: int | None,
    output_type: str,
    previews: int,
) -> Estimate:
    """`VARControlPipeline.estimate`."""
    check_call(num_images_per_prompt, output_type, None)
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("pass either prompt or prompt_embeds")
    lengths = _embedded(prompt_embeds) if prompt is None else _lengths(pipe, prompt, "prompt")
    negative = [] if negative_prompt is None else _lengths(pipe, negative_prompt, "negative_prompt")
    given, size = read_references(control, pipe.controls, reused)
    plan = pipe._plan(schedule, height, width, size)
    controls, active = references(given, pipe.controls, plan, len(lengths))
    numbers = (guidance_scale, control_guidance_scale, guidance_layer, None, None, None)
    values = read_numbers(pipe.config, *numbers, controlled=bool(active))
    acting = [one.control for one in active]
    guidance = read_guidance(values, len(plan), controls, acting, len(pipe.transformer.blocks))
    scales = len(plan) if stop_after is None else stop_after
    if not 1 <= scales <= len(plan):
        raise ValueError(f"stop_after is {stop_after}; pass a number of scales from 1 to {len(plan)}")
    router = router or SingleModel(pipe.transformer)
    given_texts = [*([] if prompt is None else _distinct(prompt, lengths)), *_distinct(negative_prompt, negative)]
    run = DryRun(
        transformer=pipe.transformer,
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tiles=pipe._tiles,
        plan=plan,
        guidance=guidance,
        lengths=lengths,
        encoded_lengths=given_texts,
        negative=negative,
        images_per_prompt=num_images_per_prompt,
        references=active,
        policy=cache or FullCache(),
        router=router,
        search=search,
        previews=previews,
        scales=scales,
        output=output_type != "latent",
        offloads=any(hasattr(part, "_hf_hook") for part in _parts(pipe).values()),
        weights=_weights(pipe, router, plan.steps[:scales]),
    )
    count(run)
    return _estimate_of(run)


def _estimate_of(run: DryRun) -> Estimate:
    return Estimate(
        schedule=run.plan,
        images=run.images,
        branches=run.guidance.branches,
        dtype=run.transformer.dtype,
        weights=run.weights,
        text_bytes=run.text_bytes,
        bank_bytes=run.bank_bytes,
        kv_bytes=run.kv_bytes,
        kv_peak_bytes=run.kv_peak_bytes,
        activations=run.activations,
        memory=run.memory,
        flops=dict(run.flops),
        decodes=run.decodes,
        scales=tuple(run.costs),
        uncounted=tuple(run.uncounted),
    )


def _parts(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _weights(pipe: Any, router: Router, steps: Steps) -> dict[str, int]:
    """Bytes of every component, of what controls add to the backbone, and of further networks that draw."""
    sizes = {name: nbytes(part) for name, part in _parts(pipe).items()}
    sizes |= {f'control "{kind}"': nbytes(adapter) for kind, adapter in pipe.controls.items()}
    drawing = {id(network): network for network in (backbone_of(router.route(step).backbone) for step in steps)}
    others = [network for network in drawing.values() if network is not pipe.transformer]
    return sizes | {f"network {number}": nbytes(network) for number, network in enumerate(others, 2)}


def _lengths(pipe: Any, prompt: str | int | Sequence[str | int], name: str) -> list[int]:
    """Tokens of each prompt; whole numbers are such already."""
    limit = pipe.transformer.config["text_length"]
    lengths = []
    for one in [prompt] if isinstance(prompt, str | int) else prompt:
        if isinstance(one, str):
            if pipe.tokenizer is None:
                raise ValueError(f"this pipeline has no tokenizer, so {name} cannot be counted; pass numbers of tokens")
            lengths.append(min(limit, len(pipe.tokenizer(one, verbose=False)["input_ids"])))
        elif isinstance(one, int) and 1 <= one <= limit:
            lengths.append(one)
        else:
            raise ValueError(f"{name} holds {one!r}; pass strings, or numbers of tokens from 1 to {limit}")
    if not lengths:
        raise ValueError(f"{name} is {prompt!r}; pass at least one")
    return lengths


def _distinct(prompt: Any, lengths: Sequence[int]) -> list[int]:
    """Tokens of what the text encoder reads: every different string once."""
    given = [prompt] if isinstance(prompt, str | int) else list(prompt or ())
    keyed = {
        one if isinstance(one, str) else place: n for place, (one, n) in enumerate(zip(given, lengths, strict=True))
    }
    return list(keyed.values())


def _embedded(embeds: Any) -> list[int]:
    if isinstance(embeds, TextFeatures):
        return list(embeds.lengths)
    lengths = [len(row) for row in embeds]
    if not lengths or min(lengths) < 1:
        raise ValueError("prompt_embeds is empty; pass (B, P, T), or a list of (P, T), P >= 1")
    return lengths
