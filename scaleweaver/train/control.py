"""Recipe "control": a ScaleWeaver adapter from pictures and the control maps made of them.

ScaleWeaver (arXiv 2510.14882): teacher forcing, only the condition stream's LoRA, the zero-initialised projections and
the type embedding learn. Inferred: text and control are dropped independently of each other for one sample in ten,
thresholds vary, and the projections have a learning rate of their own.
The backbone is frozen, as in the paper, unless `backbone_lr_scale` is set: backbone and text encoder then learn along,
on samples with and without the control. The built-in model needs that, see docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from scaleweaver.adapters import add_control, save_control, trainable_parameters
from scaleweaver.cache import KVCache
from scaleweaver.contracts import Control, TextContext, TextFeatures
from scaleweaver.controls.canny import canny
from scaleweaver.evaluate.control import canny_f1
from scaleweaver.methods.scaleweaver import ControlAdapter, ScaleWeaverConfig, encode
from scaleweaver.pipeline import VARControlPipeline, VARPipelineOutput
from scaleweaver.reference import ReferenceInjector
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.train.backbone import decay_groups, encode_text
from scaleweaver.train.data import (
    CachedText,
    Pixels,
    Renders,
    as_pixels,
    cached_text,
    latent_reader,
    random_canny,
    save_grid,
    to_images,
)
from scaleweaver.train.losses import bit_loss
from scaleweaver.train.trainer import TrainConfig


class ControlLoss(nn.Module):
    """Bit cross-entropy under a control; forward({"latent", "maps", "drop", "seen", and the text}, seed).

    The text is either tokens, "ids" and "mask", or packed "features" with their "lengths". `whole`: the gradient also
    reaches the text encoder.
    """

    def __init__(
        self,
        pipe: VARControlPipeline,
        adapter: ControlAdapter,
        name: str,
        schedule: ScaleSchedule,
        strength: float,
        whole: bool = False,
    ):
        super().__init__()
        self.whole = whole
        self.transformer, self.text_encoder, self.vae = pipe.transformer, pipe.text_encoder, pipe.vae
        self.adapter, self.name, self.strength = adapter, name, strength
        self.schedule = schedule

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        target, schedule = self.vae.target, self.schedule
        with torch.set_grad_enabled(self.whole and torch.is_grad_enabled()):
            context = self.transformer.encode_text(self._text(batch))
        with torch.no_grad():
            noise = torch.Generator(batch["latent"].device).manual_seed(seed)
            inputs, labels, _ = target.self_correct(batch["latent"], schedule, self.strength, len(schedule), noise)
        injectors = self._injectors(batch["maps"], batch["seen"], context)
        logits = self.transformer(inputs, schedule.steps, context, KVCache(), injectors=injectors)
        loss, _, accuracy = bit_loss(logits, labels, schedule)
        return loss, {f"accuracy_{i}": a.detach() for i, a in enumerate(accuracy)}

    def _injectors(self, maps: Tensor, seen: Tensor, context: TextContext) -> tuple[ReferenceInjector, ...]:
        """The control of the rows in `seen` (B,); the others have none, as at strength 0, and cost nothing."""
        if not seen.any():
            return ()
        read = None
        if self.adapter.config.condition_modulation == "text":
            read = replace(context, modulation=context.modulation[seen])
        with torch.no_grad():
            condition = self.vae.encode(maps[seen])  # (rows seen, d, Hl, Wl)
        bank = encode(self.transformer, self.adapter, self.name, condition, self.schedule, self.vae.target, read)
        place = seen.long().cumsum(0).sub(1).clamp_min(0)  # (B,) row of the bank; any for those that do not look
        ones = [1.0] * len(self.schedule)
        return (ReferenceInjector(bank.select_rows(place), self.adapter, ones, tuple(seen.tolist()), images=1),)

    def _text(self, batch: Mapping[str, Tensor]) -> TextFeatures:
        """Packed features; rows with `drop` get the unconditional table instead, as in `encode_text`."""
        if "ids" in batch:
            return encode_text(self.text_encoder, self.transformer, batch["ids"], batch["mask"], batch["drop"])
        features, lengths = batch["features"], batch["lengths"]  # (sum of lengths, T), (B,)
        positions = torch.cat([torch.arange(n, device=features.device) for n in lengths.tolist()])  # (sum of lengths,)
        dropped = batch["drop"].repeat_interleave(lengths)[:, None]  # (sum of lengths, 1)
        null = self.transformer.null_text[positions].to(features.dtype)
        return TextFeatures(torch.where(dropped, null, features), tuple(lengths.tolist()))


class ControlRecipe:
    """Options: data, val_data, model (pipeline folder), latents (cache folder), kind, name, adapter (ScaleWeaverConfig
    fields), strength, text_dropout, control_dropout, z_lr_scale, text_cache (keep the features of all captions beside
    the latents, on by default where the pictures are in stores: it pays where a run reads the captions several times),
    backbone_lr_scale (0, the default: the backbone is frozen and the result is the control; above 0 backbone and text
    encoder learn at this multiple of the learning rate and the result is a whole pipeline).
    """

    option_names = frozenset((
        "data", "val_data", "model", "latents", "kind", "name", "adapter", "strength", "text_dropout",
        "control_dropout", "z_lr_scale", "text_cache", "backbone_lr_scale",
    ))  # fmt: skip

    def __init__(self, config: TrainConfig):
        options = config.options.among(self.option_names)
        self.backbone_lr_scale: float = options.get("backbone_lr_scale", 0.0)
        whole = self.backbone_lr_scale > 0
        if self.backbone_lr_scale < 0:
            raise ValueError(f"backbone_lr_scale={self.backbone_lr_scale}: expected 0 (frozen) or more")
        if whole and options.get("text_cache"):
            raise ValueError("text_cache keeps features that a trained text encoder outgrows; set it to false")
        torch.manual_seed(config.seed)
        self.config, self.seed = config, config.seed
        self.kind: str = options["kind"]
        self.name: str = options.get("name", self.kind)
        self.renders, self.held_out = Renders(options["data"]), Renders(options["val_data"])
        self.pipe = VARControlPipeline.from_pretrained(options["model"])
        self.pipe.set_progress_bar_config(disable=True)
        for name in list(self.pipe.available_controls):
            self.pipe.unload_control(name)
        self.height, self.width = self.renders.image(0).shape[:2]
        schedule = self.pipe._plan(None, self.height, self.width, None)
        if (schedule.height, schedule.width) != (self.height, self.width):
            raise ValueError(
                f"the pictures are {self.width}x{self.height}, the model draws {schedule.width}x{schedule.height}; "
                "render them in that size"
            )
        for network in (self.pipe.transformer, self.pipe.text_encoder, self.pipe.vae):
            network.eval().requires_grad_(False).to(PartialState().device)
        settings = ScaleWeaverConfig.from_dict({"kind": self.kind, **options.get("adapter", {})})
        self.adapter = add_control(self.pipe.transformer, settings, self.name)
        self.pipe.controls[self.name] = self.adapter
        if whole:
            self.pipe.transformer.requires_grad_(True)
            self.pipe.text_encoder.requires_grad_(True)
            self.pipe._card = None  # it describes the weights that this run starts from
        latents = Path(options.get("latents", Path(config.out) / "latents"))
        self.latents = latent_reader(latents / "train", self.pipe.vae, self.renders)
        self.held_out_latents = latent_reader(latents / "val", self.pipe.vae, self.held_out)
        self.text: CachedText | None = None
        if options.get("text_cache", not self.renders.online and not whole):
            limit = self.pipe.transformer.config["text_length"]
            encoder, tokenizer = self.pipe.text_encoder, self.pipe.tokenizer
            self.text = cached_text(latents / "text", encoder, tokenizer, self.renders, max_length=limit)
        strength = options.get("strength", 0.3)
        self.model: nn.Module = ControlLoss(self.pipe, self.adapter, self.name, schedule, strength, whole)

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        named = trainable_parameters(self.pipe.transformer, self.adapter, self.name)
        z = [p for name, p in named.items() if ".z." in name]
        other = [p for name, p in named.items() if ".z." not in name]
        groups: list[dict[str, Any]] = [{"params": z, "lr_scale": self.config.options.get("z_lr_scale", 1.0)}]
        groups.append({"params": other})
        if self.backbone_lr_scale:
            own = {id(p) for p in named.values()}
            networks = (self.pipe.transformer, self.pipe.text_encoder)
            weights = [(n, p) for network in networks for n, p in network.named_parameters() if id(p) not in own]
            groups += [{**group, "lr_scale": self.backbone_lr_scale} for group in decay_groups(weights)]
        return groups

    @property
    def thresholds(self) -> tuple[float, float]:
        """Of the canny maps that the adapter is measured with, and that its users are to give."""
        low, high = self.adapter.config.thresholds or (100, 200)
        return low, high

    def control_map(self, renders: Renders, row: int, rng: np.random.Generator | None = None) -> Pixels:
        """The control image (H, W, 3) of a picture; canny with `thresholds` unless `rng` draws some."""
        if self.kind == "canny":
            picture = renders.image(row)
            return random_canny(picture, rng) if rng else np.asarray(canny(picture, *self.thresholds))
        if self.kind == "depth":
            return renders.depth(row)
        raise ValueError(f'control kind "{self.kind}" has no training maps; expected canny or depth')

    def batch(self, index: int, size: int) -> Mapping[str, Any]:
        options = self.config.options
        rng = np.random.default_rng((self.seed, index))
        rows = self.renders.rows(self.seed, index * size, size)
        captions = [self.renders.captions(r) for r in rows]
        wordings = [int(rng.integers(len(each))) for each in captions]
        if self.text is None:
            text = self._tokens([each[wording] for each, wording in zip(captions, wordings, strict=True)])
        else:
            features, lengths = self.text.read(rows, wordings)
            text = {"features": features, "lengths": lengths}
        maps = np.stack([self.control_map(self.renders, r, rng) for r in rows])
        drop = rng.random(size) < options.get("text_dropout", 0.1)
        seen = rng.random(size) >= options.get("control_dropout", 0.1)
        seen[0] |= not seen.any()  # a frozen backbone alone has no gradient
        return self._batch(self.latents(rows), text, maps, drop, seen)

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        limit = self.pipe.transformer.config["text_length"]
        tokens = self.pipe.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}

    def _batch(self, latents: Any, text: dict[str, Tensor], maps: Pixels, drop: Any, seen: Any) -> dict[str, Tensor]:
        batch = {
            "latent": torch.from_numpy(latents).float(),
            "maps": to_images(maps),
            "drop": torch.from_numpy(drop),
            "seen": torch.from_numpy(seen),
        }
        return {name: value.to(self.pipe.transformer.device) for name, value in (batch | text).items()}

    @torch.no_grad()
    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Teacher-forced loss with and without the control (the early signal), and fidelity of 24 pictures."""
        count, drawn = min(96, len(self.held_out)), 24
        texts = [self.held_out.captions(i)[0] for i in range(count)]
        maps = np.stack([self.control_map(self.held_out, i) for i in range(count)])
        latents, tokens = self.held_out_latents(range(count)), self._tokens(texts)
        off, on = np.zeros(count, bool), np.ones(count, bool)
        values = {}
        for name, seen in (("with", on), ("without", off)):
            batch = self._batch(latents, tokens, maps, off, seen)
            values[f"loss_{name}"] = float(self.model(batch, 0)[0])
        controls = [Control(self.name, m) for m in maps[:drawn]]
        pictures = []
        for i, control in enumerate(controls):
            size = {"height": self.height, "width": self.width}
            out = self.pipe(texts[i], control=control, seed=i, output_type="pt", **size)
            assert isinstance(out, VARPipelineOutput)
            pictures.append(as_pixels(out.images * 2 - 1)[0])
        if self.kind == "canny":
            low, high = self.thresholds
            scores = [canny_f1(p, m, low=low, high=high) for p, m in zip(pictures, maps, strict=False)]
            values |= {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
        pairs = [np.concatenate([m, p]) for m, p in zip(maps, pictures, strict=False)]
        save_grid(folder / f"{step:06d}.png", np.stack(pairs), columns=8)
        return values

    def save(self, folder: Path) -> None:
        if self.backbone_lr_scale:
            self.pipe.save_pretrained(folder)
            return
        save_control(folder / self.name, self.pipe.transformer, self.adapter, self.name)
