"""Memory and work of a call, told before it runs: keys and values, weights, activations, products, decodes.

Bytes that are held and products are counted by formula, from the shapes of the networks; what the networks hold in
between is found by running them on tensors that have a shape and no memory. Nothing is computed, and no weights are
needed: a pipeline on the meta device will do.

A floating-point operation is one multiplication or one addition; only those of matrix products, convolutions and
attention count. Figures hold for the torch references; kernels need less memory in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scaleweaver.cache import FullCache, KVCache
from scaleweaver.contracts import CachePolicy, Control, Router, Search, Steps, TextContext, TextFeatures
from scaleweaver.control_images import EncodedControl, acts, control_strengths, settle
from scaleweaver.evaluate.memory import dry_peak_bytes, nbytes, storage_bytes, without_storage
from scaleweaver.graphs import backbone_of
from scaleweaver.images import read_image
from scaleweaver.kernels.interval_attention import computed_pairs
from scaleweaver.kernels.key_ranges import KeyRanges
from scaleweaver.loop import SingleModel
from scaleweaver.masks import key_ranges
from scaleweaver.methods.scaleweaver import ControlAdapter, encode
from scaleweaver.precision import fuses_linear
from scaleweaver.reference import ReferenceBank, ReferenceInjector, reference_ranges
from scaleweaver.request import check_call, read_guidance, read_numbers
from scaleweaver.schedule import ScaleSchedule, ScaleStep
from scaleweaver.tokenizers.autoencoder import Upsample
from scaleweaver.tokenizers.tiling import Tiles

MIB = 2**20


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


@dataclass
class Estimator:
    """Counts one call. `lengths` are the tokens of each prompt, `negative` those of negative prompts."""

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

    @torch.no_grad()
    def run(self) -> Estimate:
        self.flops: dict[str, int] = defaultdict(int)
        self.decodes = 0
        self.activations: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.uncounted: list[str] = []
        self.images = len(self.lengths) * self.images_per_prompt
        self.bare = {id(self.transformer): without_storage(self.transformer)}
        self.bare_vae = _bare_vae(self.vae)
        self.fused_gelu = fuses_linear(self.transformer.null_text)
        self._text_encoder()
        banks, encoded = self._controls()
        steps = self.plan.steps[: self.scales]
        first = backbone_of(self.router.route(steps[0]).backbone)
        text_bytes = self._text(first, encoded + self._features())
        held = text_bytes + encoded + self._features()
        costs, kv, kv_peak, images = self._loop(steps, first, held)
        self._decode(held, images)
        return Estimate(
            self.plan, self.images, self.guidance.branches, self.transformer.dtype, self.weights, text_bytes, banks,
            kv, kv_peak, self.activations, self.memory, dict(self.flops), self.decodes, costs, tuple(self.uncounted),
        )  # fmt: skip

    def _stage(self, name: str, component: str, held: int, between: int) -> None:
        """One more moment of a stage; of several the largest counts."""
        resident = self.weights.get(component, 0) if self.offloads else sum(self.weights.values())
        self.activations[name] = max(self.activations.get(name, 0), between)
        self.memory[name] = max(self.memory.get(name, 0), resident + held + between)

    def _text_encoder(self) -> None:
        if self.text_encoder is None or not self.encoded_lengths:
            return
        bare, config = without_storage(self.text_encoder), self.text_encoder.config
        per_token = sum(_products(layer) for layer in self.text_encoder.modules() if isinstance(layer, nn.Linear))
        for length in sorted(set(self.encoded_lengths)):
            count = list(self.encoded_lengths).count(length)
            pairs = 4 * length * length * config.num_heads * config.d_kv * config.num_layers
            self.flops["text encoder"] += count * (length * per_token + pairs)
            ids = torch.empty(count, length, dtype=torch.long, device="meta")
            self._stage("text encoder", "text_encoder", 0, dry_peak_bytes(lambda: bare(input_ids=ids)))  # noqa: B023

    def _bare(self, network: Any) -> Any:
        if id(network) not in self.bare:
            self.bare[id(network)] = without_storage(network)
        return self.bare[id(network)]

    def _texts(self) -> list[int]:
        """Tokens of every text that runs through the backbone: prompts, and what the other branches read."""
        null = [] if self.guidance.branches == 1 else list(self.negative) or sorted(set(self.lengths))
        return [*self.lengths, *null]

    def _text(self, network: Any, held: int) -> int:
        """Keys, values and pooled vectors of all rows; they are made for each text and then copied to its rows."""
        texts, rows = self._texts(), self.guidance.branches * self.images
        self.flops["text keys and values"] += _text_flops(network, texts)
        bare = self._bare(network)

        def read() -> TextContext:
            features = torch.empty(sum(texts), network.config["text_width"], device="meta") + 0  # all texts, joined
            context: TextContext = bare.encode_text(TextFeatures(features, tuple(texts)))
            return context.select_rows(torch.zeros(rows, dtype=torch.long, device="meta"))

        self._stage("prompt", "transformer", held, dry_peak_bytes(read, fused_gelu=self.fused_gelu))
        return _text_bytes(network, rows, max(texts))

    def _controls(self) -> tuple[dict[str, int], int]:
        """Bytes of every bank, and of all that is held for controls: what banks are views of, copies, latents."""
        banks: dict[str, int] = {}
        held = self._features()
        bare = self.bare[id(self.transformer)]
        self.bare_banks: list[ReferenceBank] = []
        self.bare_adapters = [without_storage(one.adapter) for one in self.references]
        latent_grid = self.vae.target.final_grid(self.plan)
        for one, adapter in zip(self.references, self.bare_adapters, strict=True):
            kind = one.control.kind
            rows = self.guidance.branches * self.images if one.waits else one.pictures
            picture = torch.empty(1, 3, self.plan.height, self.plan.width, device="meta")
            latent = torch.empty(
                rows if one.waits else one.pictures, self.vae.config["bits"], *latent_grid, device="meta"
            )
            if one.fresh:
                work, between = _convolutions(lambda: self.bare_vae.encode(picture))  # noqa: B023
                self.flops["control encoder"] += one.pictures * work
                self._stage("control encoder", "vae", held + (one.pictures - 1) * latent[:1].nbytes, between)
            text = _bare_text(bare, rows, max(self._texts()), False) if one.waits else None
            made: list[ReferenceBank] = []

            def prefill() -> None:
                made.append(encode(bare, adapter, kind, latent, self.plan, self.vae.target, text))  # noqa: B023

            between = dry_peak_bytes(prefill, fused_gelu=self.fused_gelu)
            if one.fresh or one.waits:
                self.flops["control prefill"] += _prefill_flops(self.transformer, one.adapter, kind, rows, self.plan)
                self._stage("control prefill", "transformer", held + latent.nbytes, between)
            bank = made[0]
            banks[kind] = bank.nbytes()
            held += storage_bytes([*bank.keys.values(), *bank.values.values()]) + latent.nbytes * one.pictures // len(
                latent
            )
            if not one.waits and one.pictures > 1:
                bank = bank.select_rows(torch.zeros(self.images, dtype=torch.long, device="meta"))
                held += bank.nbytes()
            self.bare_banks.append(bank)
        return banks, held - self._features()

    def _injectors(self, images: int) -> list[ReferenceInjector]:
        made = []
        for place, (one, adapter, bank) in enumerate(
            zip(self.references, self.bare_adapters, self.bare_banks, strict=True)
        ):
            rows = torch.zeros(bank.rows * images // self.images, dtype=torch.long, device="meta")
            chosen = bank if bank.rows == 1 else bank.select_rows(rows)
            mask = one.control.mask
            if mask is not None:
                mask = mask[torch.arange(len(mask)).repeat_interleave(images // len(mask) if len(mask) > 1 else 1)]
            sees = self.guidance.sees_control(place)
            made.append(ReferenceInjector(chosen, adapter, one.strengths, sees, mask=mask, images=images))
        return made

    def _loop(self, steps: Steps, first: Any, held: int) -> tuple[tuple[ScaleCost, ...], int, int, int]:
        costs: list[ScaleCost] = []
        history: dict[int, int] = {}
        kv_most = kv_peak = 0
        network, images, rows = first, self.images, self.guidance.branches * self.images
        prompt = max(self._texts())
        latent = self.vae.config["bits"] * _area(self.vae.target.final_grid(self.plan)) * 4
        in_place = type(self.policy) is FullCache
        capacity = self.plan.steps[-1].start
        injectors = self._injectors(images)
        routes = [self.router.route(step) for step in steps]
        for step, route in zip(steps, routes, strict=True):
            now: Steps = (step,)
            chosen = backbone_of(route.backbone)
            if chosen is not network:
                network, now, history = chosen, steps[: step.index + 1], {}
                self._text(network, held)
            layers = tuple(range(len(network.blocks)) if route.layers is None else route.layers)
            size = _token_bytes(network)

            def memory_of(count: int, known: Mapping[int, int]) -> int:
                return count * size * (capacity * len(known) if in_place else sum(known.values()))  # noqa: B023

            alive = self.guidance.alive(step) * images
            if alive < rows:  # the rows that go on are copied out of all rows
                less = _text_bytes(network, alive, prompt)
                self._stage(
                    "scales",
                    "transformer",
                    held + memory_of(rows, history),
                    alive * size * sum(history.values()) + less,
                )
                held += less
                rows = alive
            acting = network is self.transformer
            work = self._scale_flops(network, now, rows, images, layers, history, prompt, acting)
            before = dict(history)
            self._commit(network, now, rows, layers, history)
            for stale in _unused(routes[step.index + 1 :], network):
                history.pop(stale, None)
            remembered = rows * size * sum(history.values())
            own = rows * size * (before.get(layers[-1], 0) + sum(each.n for each in now))
            kv_most = max(kv_most, remembered, rows * size * sum(before.values()))
            kv_peak = max(kv_peak, rows * size * sum(before.values()) + own)
            between = 0
            for layer in self._probed(layers if acting else layers[-1:]):
                others = {**before, **history, layer: before.get(layer, 0)}
                used = self._activations(
                    network, now, rows, layer, before.get(layer, 0), prompt, injectors if acting else [], in_place
                )
                inputs = rows * sum(each.n for each in now) * network.config["bits"] * 4
                codes = images * step.stop * network.config["bits"]
                at_hand = held + memory_of(rows, others) + images * latent + inputs + codes
                self._stage("scales", "transformer", at_hand, used)
                between = max(between, used)
            mean = sum(before.get(layer, 0) for layer in layers) // len(layers)
            costs.append(ScaleCost(step, rows, mean, work, remembered, between))
            self.decodes += self.previews * images
            if isinstance(self.search, SearchEstimate):
                self.decodes += self.search.decodes(step, images)
                survivors = self.search.population(step, images)
                if survivors != images:
                    rows, images = rows // images * survivors, survivors
                    injectors = self._injectors(images)
        if self.search is not None and not isinstance(self.search, SearchEstimate):
            self.uncounted.append(f"what {type(self.search).__name__} decodes, and that it may stop some pictures")
        return tuple(costs), kv_most, kv_peak, images

    def _probed(self, layers: Sequence[int]) -> list[int]:
        """The last layer, and the last one that reads controls."""
        reading = [layer for layer in layers if any(layer in one.adapter.blocks for one in self.references)]
        return sorted({layers[-1], *reading[-1:]})

    def _activations(
        self, network: Any, now: Steps, rows: int, layer: int, history: int, prompt: int,
        injectors: Sequence[ReferenceInjector], in_place: bool,
    ) -> int:  # fmt: skip
        """Most that one scale holds in between; all layers are alike but for the controls they read."""
        bare = self._bare(network)
        text = _bare_text(bare, rows, prompt, len(set(self._texts())) > 1)
        cache = KVCache(self.policy)
        heads, width = network.config["heads"], network.config["width"]
        room = self.plan.steps[-1].start if in_place else history
        if room and len(now) == 1:
            k, v = (text.keys[0].new_empty(rows, heads, room, width // heads) for _ in "kv")
            cache.resume(layer, k, v, history)
        tokens = sum(each.n for each in now if each.index > 0)
        inputs = torch.empty(rows, tokens, network.config["bits"], device="meta") if tokens else None
        alive = [one.select_rows(torch.arange(rows)) for one in injectors]
        return dry_peak_bytes(
            lambda: bare(inputs, now, text, cache, injectors=alive, layers=(layer,)), fused_gelu=self.fused_gelu
        )

    def _commit(self, network: Any, now: Steps, rows: int, layers: Sequence[int], history: dict[int, int]) -> None:
        """What every layer remembers after a scale, as the policy says."""
        step = now[-1]
        if step.is_last:
            return
        added = sum(each.n for each in now if self.policy.commits(each))
        for layer in layers:
            observed = self.policy.queries(layer, step)
            tokens = history.get(layer, 0) + added
            if observed is not None:
                seen = history.get(layer, 0) + sum(each.n for each in now)
                self.flops["cache scores"] += 2 * rows * len(observed) * seen * network.config["width"]
            if not added:
                continue
            if isinstance(self.policy, CacheEstimate):
                tokens = self.policy.kept(layer, step, tokens)
            elif observed is not None:
                raise ValueError(
                    f"{type(self.policy).__name__} chooses by attention scores, which only a run knows; give it a "
                    "method kept(layer, step, tokens) that says how many it keeps"
                )
            else:
                index = self.policy.keep(layer, step, tokens, None)
                tokens = tokens if index is None else index.shape[-1]
            history[layer] = tokens

    def _scale_flops(
        self, network: Any, now: Steps, rows: int, images: int, layers: Sequence[int], history: Mapping[int, int],
        prompt: int, acting: bool,
    ) -> int:  # fmt: skip
        width = network.config["width"]
        tokens = sum(step.n for step in now)
        work: dict[str, int] = defaultdict(int)
        read = sum(step.n for step in now if step.index > 0)
        work["linear layers"] += rows * read * _products(network.code_embed)
        for layer in layers:
            block = network.blocks[layer]
            per_token = (
                _products(block.attn.qkv)
                + _products(block.attn.proj)
                + _products(block.ffn.fc1)
                + _products(block.ffn.fc2)
            )
            per_token += _products(block.cross.q) + _products(block.cross.proj)
            work["linear layers"] += rows * tokens * per_token
            past = history.get(layer, 0)
            ranges = key_ranges(now, "block_causal", past) if len(now) > 1 else None
            work["self-attention"] += 4 * rows * _pairs(ranges, tokens, past + tokens) * width
            work["cross-attention"] += 4 * rows * tokens * prompt * width
        for place, one in enumerate(self.references if acting else ()):
            if not any(one.strengths[step.index] for step in now):
                continue
            readers = sum(self.guidance.sees_control(place)[: rows // images]) * images
            keys = now[-1].stop - (now[0].start if one.adapter.scope == "same" else 0)
            pairs = _pairs(reference_ranges(now, one.adapter.scope), tokens, keys)
            for layer in set(layers) & set(one.adapter.blocks):
                work["reference attention"] += 4 * readers * pairs * width
                if one.adapter.fusion == "separate":
                    work["reference attention"] += readers * tokens * _products(one.adapter.z[str(layer)])
        # one output per bit, unless a LoRA sits in the head
        classes = 1 if type(network.head) is nn.Linear else 2
        work["head"] += rows * tokens * _products(network.head) * classes // 2 + rows * _products(
            network.head_modulation
        )
        for kind, count in work.items():
            self.flops[kind] += count
        return sum(work.values())

    def _decode(self, held: int, images: int) -> None:
        self.decodes += images if self.output else 0
        if not self.decodes:
            return
        latent_grid = self.vae.target.final_grid(self.plan)
        latent = torch.empty(images, self.vae.config["bits"], *latent_grid, device="meta")
        work, _ = _convolutions(lambda: self._decoded(latent[:1]))
        self.flops["decode"] += self.decodes * work
        pictures = images * 3 * self.plan.height * self.plan.width * 4
        codes = images * self.plan.steps[self.scales - 1].stop * self.vae.target.width

        def draw() -> Tensor:
            return torch.cat([self._decoded(row) for row in latent.split(1)]) / 2 + 0.5

        between = max(dry_peak_bytes(draw), 3 * pictures)  # decoded, then turned into 8-bit pictures
        self._stage("decode", "vae", held + 2 * (latent.nbytes + codes), between)

    def _decoded(self, latent: Tensor) -> Tensor:
        picture: Tensor = (
            self.bare_vae.decode(latent) if self.tiles is None else self.tiles.decode(self.bare_vae, latent)
        )
        return picture

    def _features(self) -> int:
        """The text encoder's states, float32."""
        return 4 * int(self.transformer.config["text_width"]) * (sum(self.lengths) + sum(self.negative))


def _products(layer: Any, name: str | None = None) -> int:
    """Operations of a linear layer per token, with the LoRA `name` or with those that are on."""
    if not isinstance(layer, LoraLayer):
        return 2 * int(layer.in_features) * int(layer.out_features)
    base: Any = layer.base_layer
    reads, writes = int(base.in_features), int(base.out_features)
    on = [name] if name else [] if layer.disable_adapters else layer.active_adapters
    ranks = sum(int(layer.r[one]) for one in on if one in layer.lora_A)
    return 2 * reads * writes + 2 * ranks * (reads + writes)


def _token_bytes(network: Any) -> int:
    """Key and value of one token in one layer."""
    return 2 * int(network.config["width"]) * int(network.blocks[0].attn.q_bias.element_size())


def _text_flops(network: Any, lengths: Sequence[int]) -> int:
    tokens, texts, width = sum(lengths), len(lengths), int(network.config["width"])
    per_token = _products(network.text_pool.kv) + sum(_products(network.text_proj[i]) for i in (0, 2))
    per_token += sum(_products(block.cross.kv) for block in network.blocks)
    per_text = 4 * max(lengths) * width + _products(network.text_pool.proj) + _products(network.shared_modulation)
    return tokens * per_token + texts * per_text


def _text_bytes(network: Any, rows: int, prompt: int) -> int:
    size = int(network.blocks[0].cross.v_bias.element_size())
    return rows * int(network.config["width"]) * (2 * prompt * size * len(network.blocks) + 4 * 7)


def _bare_text(network: Any, rows: int, prompt: int, masked: bool) -> TextContext:
    heads, width = network.config["heads"], network.config["width"]
    dtype = network.blocks[0].cross.v_bias.dtype
    keys = torch.empty(rows, heads, prompt, width // heads, dtype=dtype, device="meta")
    mask = torch.empty(rows, 1, 1, prompt, dtype=torch.bool, device="meta") if masked else None
    pooled, modulation = (torch.empty(rows, *shape, width, device="meta") for shape in ((), (1, 6)))
    return TextContext(pooled, modulation, [keys] * len(network.blocks), [keys] * len(network.blocks), mask)


def _prefill_flops(network: Any, adapter: ControlAdapter, name: str, rows: int, plan: ScaleSchedule) -> int:
    width, tokens = network.config["width"], plan.length
    work = rows * tokens * _products(network.code_embed, name)
    for layer in range(adapter.blocks[-1] + 1):
        block = network.blocks[layer]
        work += rows * tokens * _products(block.attn.qkv, name)
        if layer < adapter.blocks[-1]:  # of the last block keys and values alone are needed
            rest = (block.attn.proj, block.ffn.fc1, block.ffn.fc2)
            work += rows * tokens * sum(_products(part, name) for part in rest)
            work += 4 * rows * _pairs(reference_ranges(plan.steps, adapter.scope), tokens, tokens) * width
    if adapter.config.condition_modulation == "null":
        work += _text_flops(network, [min(adapter.config.null_tokens, network.config["text_length"])])
    return work


def _pairs(ranges: KeyRanges | None, queries: int, keys: int) -> int:
    return queries * keys if ranges is None else computed_pairs(ranges, keys)


def _bare_vae(vae: Any) -> Any:
    """The tokenizer without memory, which works as on its own device."""
    bare = without_storage(vae)
    for part in bare.modules():
        if isinstance(part, Upsample):
            part.forward = partial(part.as_on, vae.device.type)  # type: ignore[method-assign]
    return bare


def decode_cost(vae: Any, height: int, width: int) -> tuple[int, int]:
    """(operations, most bytes in between) of decoding one picture."""
    bare, stride = _bare_vae(vae), vae.config["stride"]
    latent = torch.empty(1, vae.config["bits"], height // stride, width // stride, device="meta")
    with torch.no_grad():
        return _convolutions(lambda: bare.decode(latent))


def _convolutions(run: Callable[[], Any]) -> tuple[int, int]:
    """(operations, most bytes in between) of an encoder or decoder on the meta device."""
    with FlopCounterMode(display=False) as counter:
        between = dry_peak_bytes(run)
    return counter.get_total_flops(), between


def _unused(later: Sequence[Any], network: Any) -> set[int]:
    """Layers of `network` that no later scale runs, whose history the loop forgets."""
    used: set[int] = set()
    for route in later:
        if backbone_of(route.backbone) is not network:
            break
        if route.layers is None:
            return set()
        used.update(route.layers)
    return set(range(len(network.blocks))) - used if later else set()


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


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
    return Estimator(
        pipe.transformer, pipe.vae, pipe.text_encoder, pipe._tiles, plan, guidance, lengths, given_texts, negative,
        num_images_per_prompt, active, cache or FullCache(), router, search, previews, scales,
        output_type != "latent", any(hasattr(part, "_hf_hook") for part in _parts(pipe).values()),
        _weights(pipe, router, plan.steps[:scales]),
    ).run()  # fmt: skip


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
