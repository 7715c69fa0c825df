"""Recipe "control": a ScaleWeaver adapter on a frozen backbone, from pictures and the control maps made of them.

ScaleWeaver (arXiv 2510.14882): teacher forcing, only the condition stream's LoRA, the zero-initialised projections and
the type embedding learn. Inferred: text and control are dropped independently of each other for one sample in ten,
thresholds vary, and the projections learn faster than the LoRA, whose gradient is zero until they have moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaleweaver.adapters import add_control, save_control, trainable_parameters
from scaleweaver.cache import KVCache
from scaleweaver.contracts import Control
from scaleweaver.evaluate.control import canny_f1
from scaleweaver.methods.scaleweaver import ControlAdapter, ScaleWeaverConfig, encode
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.reference import ReferenceInjector
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.train.backbone import encode_text
from scaleweaver.train.data import (
    Pixels,
    Renders,
    as_pixels,
    cached_latents,
    random_canny,
    save_grid,
    shuffled,
    to_images,
)
from scaleweaver.train.losses import bit_loss
from scaleweaver.train.trainer import TrainConfig


class ControlLoss(nn.Module):
    """Bit cross-entropy under a control; forward({"latent", "maps", "ids", "mask", "drop", "seen"}, seed)."""

    def __init__(self, pipe: VARControlPipeline, adapter: ControlAdapter, name: str, strength: float):
        super().__init__()
        self.transformer, self.text_encoder, self.vae = pipe.transformer, pipe.text_encoder, pipe.vae
        self.adapter, self.name, self.strength = adapter, name, strength
        self.schedule = ScaleSchedule.from_dict(pipe.config["schedule"])

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        target, schedule = self.vae.target, self.schedule
        with torch.no_grad():
            text = encode_text(self.text_encoder, self.transformer, batch["ids"], batch["mask"], batch["drop"])
            noise = torch.Generator(batch["latent"].device).manual_seed(seed)
            inputs, labels, _ = target.self_correct(batch["latent"], schedule, self.strength, len(schedule), noise)
            context = self.transformer.encode_text(text)
            condition = self.vae.encode(batch["maps"])
        bank = encode(self.transformer, self.adapter, self.name, condition, schedule, target)
        rows = len(batch["latent"])
        # a dropped control is an absent one: its branch is masked, as it is at strength 0
        seen = batch["seen"].float().view(rows, 1, 1, 1).expand(rows, 1, schedule.height, schedule.width)
        injector = ReferenceInjector(bank, self.adapter, [1.0] * len(schedule), (True,), mask=seen, images=rows)
        logits = self.transformer(inputs, schedule.steps, context, KVCache(), injectors=(injector,))
        loss, _, accuracy = bit_loss(logits, labels, schedule)
        return loss, {f"accuracy_{i}": a.detach() for i, a in enumerate(accuracy)}


class ControlRecipe:
    """Options: data, val_data, model (pipeline folder), latents (cache folder), kind, name, adapter (ScaleWeaverConfig
    fields), strength, text_dropout, control_dropout, z_lr_scale.
    """

    def __init__(self, config: TrainConfig):
        options = config.options
        torch.manual_seed(config.seed)
        self.config, self.seed = config, config.seed
        self.kind: str = options["kind"]
        self.name: str = options.get("name", self.kind)
        self.renders, self.held_out = Renders(options["data"]), Renders(options["val_data"])
        self.pipe = VARControlPipeline.from_pretrained(options["model"])
        self.pipe.set_progress_bar_config(disable=True)
        for name in list(self.pipe.available_controls):
            self.pipe.unload_control(name)
        for network in (self.pipe.transformer, self.pipe.text_encoder, self.pipe.vae):
            network.eval().requires_grad_(False)
        settings = ScaleWeaverConfig(kind=self.kind, **options.get("adapter", {}))
        self.adapter = add_control(self.pipe.transformer, settings, self.name)
        self.pipe.controls[self.name] = self.adapter
        latents = Path(options.get("latents", Path(config.out) / "latents"))
        self.latents = cached_latents(latents / "train", self.pipe.vae, self.renders)
        self.held_out_latents = cached_latents(latents / "val", self.pipe.vae, self.held_out)
        self.model: nn.Module = ControlLoss(self.pipe, self.adapter, self.name, options.get("strength", 0.3))

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        named = trainable_parameters(self.pipe.transformer, self.adapter, self.name)
        z = [p for name, p in named.items() if ".z." in name]
        other = [p for name, p in named.items() if ".z." not in name]
        return [{"params": z, "lr_scale": self.config.options.get("z_lr_scale", 1.0)}, {"params": other}]

    def control_map(self, renders: Renders, row: int, rng: np.random.Generator) -> Pixels:
        """The control image (H, W, 3) of a picture."""
        if self.kind == "canny":
            return random_canny(renders.image(row), rng)
        if self.kind == "depth":
            return renders.depth(row)
        raise ValueError(f'control kind "{self.kind}" has no training maps; expected canny or depth')

    def batch(self, index: int, size: int) -> Mapping[str, Any]:
        options = self.config.options
        rng = np.random.default_rng((self.seed, index))
        rows = shuffled(len(self.renders), self.seed, index * size, size)
        texts = [(c := self.renders.captions(r))[rng.integers(len(c))] for r in rows]
        maps = np.stack([self.control_map(self.renders, r, rng) for r in rows])
        drop = rng.random(size) < options.get("text_dropout", 0.1)
        seen = rng.random(size) >= options.get("control_dropout", 0.1)
        return self._batch(np.stack([self.latents[r] for r in rows]), texts, maps, drop, seen)

    def _batch(self, latents: Any, texts: list[str], maps: Pixels, drop: Any, seen: Any) -> dict[str, Tensor]:
        device = self.pipe.transformer.device
        limit = self.pipe.transformer.config["text_length"]
        tokens = self.pipe.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {
            "latent": torch.from_numpy(latents).float().to(device),
            "maps": to_images(maps).to(device),
            "ids": tokens["input_ids"].to(device),
            "mask": tokens["attention_mask"].to(device),
            "drop": torch.from_numpy(drop).to(device),
            "seen": torch.from_numpy(seen).to(device),
        }

    @torch.no_grad()
    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Teacher-forced loss with and without the control (the early signal), and fidelity of 24 pictures."""
        count, drawn = min(96, len(self.held_out)), 24
        rng = np.random.default_rng(0)
        texts = [self.held_out.captions(i)[0] for i in range(count)]
        maps = np.stack([self.control_map(self.held_out, i, rng) for i in range(count)])
        off, on = np.zeros(count, bool), np.ones(count, bool)
        values = {}
        for name, seen in (("with", on), ("without", off)):
            batch = self._batch(np.array(self.held_out_latents[:count]), texts, maps, off, seen)
            values[f"loss_{name}"] = float(self.model(batch, 0)[0])
        controls = [Control(self.name, m) for m in maps[:drawn]]
        pictures = []
        for i, control in enumerate(controls):
            out = self.pipe(texts[i], control=control, seed=i, output_type="pt")
            pictures.append(as_pixels(out.images * 2 - 1)[0])
        if self.kind == "canny":
            scores = [canny_f1(p, m) for p, m in zip(pictures, maps, strict=False)]
            values |= {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
        pairs = [np.concatenate([m, p]) for m, p in zip(maps, pictures, strict=False)]
        save_grid(folder / f"{step:06d}.png", np.stack(pairs), columns=8)
        return values

    def save(self, folder: Path) -> None:
        save_control(folder / self.name, self.pipe.transformer, self.adapter, self.name)
