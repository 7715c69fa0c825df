"""A call without its numbers, but for the loop over scales: texts, controls and decoding.

Bytes that are held and products are counted by formula, from the shapes of the networks; what the networks hold in
between is found by running them on tensors that have a shape and no memory. Nothing is computed, and no weights are
needed. Figures hold for the torch references; kernels need less memory in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from scaleweaver.backbones.layers import fuses_gelu
from scaleweaver.contracts import CachePolicy, Control, Router, Search, TextContext, TextFeatures
from scaleweaver.evaluate.memory import dry_peak_bytes, storage_bytes, without_storage
from scaleweaver.lora import lora_enabled
from scaleweaver.methods.scaleweaver import ControlAdapter, encode
from scaleweaver.reference import ReferenceBank, ReferenceInjector
from scaleweaver.schedule import ScaleSchedule, ScaleStep
from scaleweaver.tokenizers.tiling import Tiles
from scaleweaver.work import bare_text, bare_vae, convolutions, prefill_flops, products, text_bytes, text_flops


@runtime_checkable
class CacheEstimate(Protocol):
    """What a cache policy that looks at attention scores adds, so that its call can be estimated."""

    def kept(self, layer: int, step: ScaleStep, tokens: int) -> int:
        """How many of `tokens` a layer keeps after a scale."""
        ...


@runtime_checkable
class SearchEstimate(Protocol):
    """What a search adds, so that its call can be estimated."""

    def population(self, step: ScaleStep, images: int) -> int:
        """How many of `images` go on after a scale."""
        ...

    def decodes(self, step: ScaleStep, images: int) -> int:
        """How many pictures it decodes to choose them."""
        ...


@dataclass(frozen=True)
class ScaleCost:
    """One scale: `tokens` of each of `rows` (branches times images), the history it reads, its work and memory."""

    step: ScaleStep
    rows: int
    history: int  # tokens of earlier scales that the layers remember, on average
    flops: int
    kv_bytes: int  # keys and values that outlive it
    activation_bytes: int  # most that the backbone holds in between

    @property
    def tokens(self) -> int:
        return self.step.n


@dataclass(frozen=True)
class Reference:
    """A control that acts: how many pictures it has, whether they still have to be encoded."""

    control: Control
    adapter: ControlAdapter
    pictures: int
    fresh: bool
    strengths: tuple[float, ...]

    @property
    def waits(self) -> bool:
        """Whether it also reads the prompt, so that every call encodes it again."""
        return self.adapter.config.condition_modulation != "null"


@dataclass(kw_only=True)
class DryRun:
    """One call, and what has been counted of it; `dry_loop.count` fills that in.

    lengths: tokens of each prompt; encoded_lengths: of each different text that the text encoder reads; negative: of
    negative prompts. scales: how many are drawn. output: whether pictures are decoded in the end.
    """

    transformer: Any
    vae: Any
    text_encoder: Any
    tiles: Tiles | None
    plan: ScaleSchedule
    guidance: Any
    lengths: Sequence[int]
    encoded_lengths: Sequence[int]
    negative: Sequence[int]
    images_per_prompt: int
    references: Sequence[Reference]
    policy: CachePolicy
    router: Router
    search: Search | None
    previews: int
    scales: int
    output: bool
    offloads: bool
    weights: Mapping[str, int]

    def __post_init__(self) -> None:
        self.flops: dict[str, int] = defaultdict(int)
        self.decodes = 0
        self.text_bytes = self.kv_bytes = self.kv_peak_bytes = 0
        self.bank_bytes: dict[str, int] = {}
        self.activations: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.costs: list[ScaleCost] = []
        self.uncounted: list[str] = []
        self._copies: dict[int, Any] = {}
        self._bare_vae = bare_vae(self.vae)
        self._banks: list[tuple[ControlAdapter, ReferenceBank]] = []

    @property
    def images(self) -> int:
        return len(self.lengths) * self.images_per_prompt

    @property
    def rows(self) -> int:
        return int(self.guidance.branches) * self.images

    @property
    def latent_grid(self) -> tuple[int, int]:
        height, width = self.vae.target.final_grid(self.plan)
        return height, width

    @property
    def texts(self) -> list[int]:
        """Tokens of every text that runs through the backbone: prompts, and what the other branches read."""
        null = [] if self.guidance.branches == 1 else list(self.negative) or sorted(set(self.lengths))
        return [*self.lengths, *null]

    @property
    def longest(self) -> int:
        return max(self.texts)

    def stage(self, name: str, component: str, *, held: int, between: int) -> None:
        """One more moment of a stage; of several the largest counts."""
        resident = self.weights.get(component, 0) if self.offloads else sum(self.weights.values())
        self.activations[name] = max(self.activations.get(name, 0), between)
        self.memory[name] = max(self.memory.get(name, 0), resident + held + between)

    def bare(self, network: Any) -> Any:
        """The network without memory, one copy of each."""
        if id(network) not in self._copies:
            self._copies[id(network)] = without_storage(network)
        return self._copies[id(network)]

    def prepare(self, network: Any) -> int:
        """Encode texts and controls, and let the first network read the texts; returns bytes that stay for the loop."""
        self._encode_texts()
        # the text encoder's states, float32
        held = 4 * int(self.transformer.config["text_width"]) * (sum(self.lengths) + sum(self.negative))
        for one in self.references:
            held += self._encode_control(one, held)
        self.read_texts(network, held)
        self.text_bytes = text_bytes(network, rows=self.rows, prompt=self.longest)
        return held + self.text_bytes

    def _encode_texts(self) -> None:
        if self.text_encoder is None or not self.encoded_lengths:
            return
        bare, config = without_storage(self.text_encoder), self.text_encoder.config
        per_token = sum(products(layer) for layer in self.text_encoder.modules() if isinstance(layer, nn.Linear))
        for length in sorted(set(self.encoded_lengths)):
            count = list(self.encoded_lengths).count(length)
            attention = 4 * length * length * config.num_heads * config.d_kv * config.num_layers
            self.flops["text encoder"] += count * (length * per_token + attention)
            ids = torch.empty(count, length, dtype=torch.long, device="meta")
            between = dry_peak_bytes(lambda: bare(input_ids=ids))  # noqa: B023
            self.stage("text encoder", "text_encoder", held=0, between=between)

    def read_texts(self, network: Any, held: int) -> None:
        """Keys, values and pooled vectors of all rows; they are made for each text and then copied to its rows."""
        texts, bare = self.texts, self.bare(network)
        self.flops["text keys and values"] += text_flops(network, texts)

        def read() -> TextContext:
            features = torch.empty(sum(texts), network.config["text_width"], device="meta") + 0  # all texts, joined
            context: TextContext = bare.encode_text(TextFeatures(features, tuple(texts)))
            return context.select_rows(torch.zeros(self.rows, dtype=torch.long, device="meta"))

        self.stage("prompt", "transformer", held=held, between=dry_peak_bytes(read))

    def _encode_control(self, one: Reference, held: int) -> int:
        """Bytes of all that is held for a control: what its bank is a view of, copies, latents."""
        rows = self.rows if one.waits else one.pictures
        latent = torch.empty(rows, self.vae.config["bits"], *self.latent_grid, device="meta")
        if one.fresh:
            picture = torch.empty(1, 3, self.plan.height, self.plan.width, device="meta")
            work, between = convolutions(lambda: self._bare_vae.encode(picture))
            self.flops["control encoder"] += one.pictures * work
            others = (one.pictures - 1) * latent[:1].nbytes
            self.stage("control encoder", "vae", held=held + others, between=between)
        adapter = without_storage(one.adapter)
        bank = self._prefill(one, adapter, latent, held)
        self.bank_bytes[one.control.kind] = bank.nbytes()
        own = storage_bytes([*bank.keys.values(), *bank.values.values()]) + latent.nbytes * one.pictures // len(latent)
        if not one.waits and one.pictures > 1:
            bank = bank.select_rows(torch.zeros(self.images, dtype=torch.long, device="meta"))
            own += bank.nbytes()
        self._banks.append((adapter, bank))
        return own

    def _prefill(self, one: Reference, adapter: ControlAdapter, latent: Tensor, held: int) -> ReferenceBank:
        network, kind, rows = self.transformer, one.control.kind, len(latent)
        bare = self.bare(network)
        text = bare_text(bare, rows=rows, prompt=self.longest, masked=False) if one.waits else None
        made: list[ReferenceBank] = []

        def prefill() -> None:
            made.append(encode(bare, adapter, kind, latent, self.plan, self.vae.target, text))

        with lora_enabled(network, kind):
            fused = fuses_all(network, range(adapter.blocks[-1]))
        between = dry_peak_bytes(prefill, fused_gelu=fused)
        if one.fresh or one.waits:
            self.flops["control prefill"] += prefill_flops(network, one.adapter, name=kind, rows=rows, plan=self.plan)
            self.stage("control prefill", "transformer", held=held + latent.nbytes, between=between)
        return made[0]

    def injectors(self, images: int) -> list[ReferenceInjector]:
        """Of all controls, for so many of the pictures."""
        made = []
        for place, (one, (adapter, bank)) in enumerate(zip(self.references, self._banks, strict=True)):
            rows = torch.zeros(bank.rows * images // self.images, dtype=torch.long, device="meta")
            chosen = bank if bank.rows == 1 else bank.select_rows(rows)
            mask = one.control.mask
            if mask is not None:
                mask = mask[torch.arange(len(mask)).repeat_interleave(images // len(mask) if len(mask) > 1 else 1)]
            sees = self.guidance.sees_control(place)
            made.append(ReferenceInjector(chosen, adapter, one.strengths, sees, mask=mask, images=images))
        return made

    def decode(self, held: int, images: int) -> None:
        """All that was asked for on the way, and in the end so many pictures."""
        self.decodes += images if self.output else 0
        if not self.decodes:
            return
        latent = torch.empty(images, self.vae.config["bits"], *self.latent_grid, device="meta")
        work, _ = convolutions(lambda: self._decoded(latent[:1]))
        self.flops["decode"] += self.decodes * work
        pictures = images * 3 * self.plan.height * self.plan.width * 4
        codes = images * self.plan.steps[self.scales - 1].stop * self.vae.target.width

        def draw() -> Tensor:
            return torch.cat([self._decoded(row) for row in latent.split(1)]) / 2 + 0.5

        between = max(dry_peak_bytes(draw), 3 * pictures)  # decoded, then turned into 8-bit pictures
        self.stage("decode", "vae", held=held + 2 * (latent.nbytes + codes), between=between)

    def _decoded(self, latent: Tensor) -> Tensor:
        bare = self._bare_vae
        picture: Tensor = bare.decode(latent) if self.tiles is None else self.tiles.decode(bare, latent)
        return picture


def fuses_all(network: Any, layers: Iterable[int]) -> bool:
    """Whether GELU takes no memory in these layers of a network with weights."""
    found = (network.blocks[layer].ffn.fc1 for layer in layers)
    return all(fuses_gelu(fc1, fc1.bias) for fc1 in found)
