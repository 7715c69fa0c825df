"""The loss of recipe "control": bits of the image stream, teacher-forced, with the condition streams beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scaleweaver.cache import KVCache
from scaleweaver.contracts import TextContext, TextFeatures
from scaleweaver.methods.scaleweaver import encode
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.reference import ReferenceInjector
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.train.backbone import encode_text
from scaleweaver.train.losses import bit_loss


class ControlLoss(nn.Module):
    """Bit cross-entropy under controls; forward({"latent" or "images", "drop", the text, and of every control
    "maps.NAME" of the rows that see it and "seen.NAME" (B,)}, seed).

    The text is either tokens, "ids" and "mask", or packed "features" with their "lengths". The latent's size tells
    which of `schedules` a batch has. "share", where it is there, says that the rows are one of several equal parts of a
    batch, (number, parts): the noise is then that of the whole batch. `whole`: the gradient also reaches the text
    encoder.
    """

    def __init__(
        self,
        pipe: VARControlPipeline,
        schedules: Sequence[ScaleSchedule],
        strength: float,
        whole: bool = False,
        by_magnitude: bool = False,
    ):
        super().__init__()
        self.whole, self.by_magnitude = whole, by_magnitude
        self.transformer, self.text_encoder, self.vae = pipe.transformer, pipe.text_encoder, pipe.vae
        self.adapters = nn.ModuleDict(pipe.controls)
        self.schedules = {pipe.vae.target.final_grid(schedule): schedule for schedule in schedules}
        self.strength = strength

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        if "images" in batch:
            with torch.no_grad():
                batch = {**batch, "latent": self.vae.encode(batch["images"])}
        target, schedule = self.vae.target, self.schedules[tuple(batch["latent"].shape[-2:])]
        with torch.set_grad_enabled(self.whole and torch.is_grad_enabled()):
            context = self.transformer.encode_text(self._text(batch))
        with torch.no_grad():
            forced = target.teacher_forcing(batch["latent"], schedule, self._flips(batch, schedule, seed))
        injectors = self._injectors(batch, context, schedule)
        logits = self.transformer(forced.inputs, schedule.steps, context, KVCache(), injectors=injectors)
        magnitudes = forced.magnitudes if self.by_magnitude else None
        loss, _, accuracy = bit_loss(logits, forced.labels, schedule, magnitudes=magnitudes)
        return loss, {f"accuracy_{i}": a.detach() for i, a in enumerate(accuracy)}

    def _flips(self, batch: Mapping[str, Tensor], schedule: ScaleSchedule, seed: int) -> list[Tensor]:
        """The bits that the history has wrong, (B, ph, pw, d) a scale."""
        device, rows = batch["latent"].device, len(batch["latent"])
        number, parts = batch["share"].tolist() if "share" in batch else (0, 1)
        noise = torch.Generator(device).manual_seed(seed)
        flips = self.vae.target.draw_flips(rows * parts, schedule, self.strength, len(schedule), noise, device)
        return [mask[number * rows : (number + 1) * rows] for mask in flips]

    def _injectors(
        self, batch: Mapping[str, Tensor], context: TextContext, schedule: ScaleSchedule
    ) -> tuple[ReferenceInjector, ...]:
        """One per control that some row sees; the other rows have none, as at strength 0, and cost nothing."""
        names = [name for name in self.adapters if f"maps.{name}" in batch]
        if not names:
            return ()
        maps = [batch[f"maps.{name}"] for name in names]
        with torch.no_grad():
            latents = self.vae.encode(torch.cat(maps)).split([len(each) for each in maps])  # (rows seen, d, Hl, Wl)
        return tuple(
            self._injector(name, latent, batch[f"seen.{name}"], context, schedule)
            for name, latent in zip(names, latents, strict=True)
        )

    def _injector(
        self, name: str, latent: Tensor, seen: Tensor, context: TextContext, schedule: ScaleSchedule
    ) -> ReferenceInjector:
        adapter: Any = self.adapters[name]
        read = None
        if adapter.config.condition_modulation == "text":
            read = replace(context, modulation=context.modulation[seen])
        bank = encode(self.transformer, adapter, name, latent, schedule, self.vae.target, read)
        place = seen.long().cumsum(0).sub(1).clamp_min(0)  # (B,) row of the bank; any for those that do not look
        ones = [1.0] * len(schedule)
        return ReferenceInjector(bank.select_rows(place), adapter, ones, tuple(seen.tolist()), images=1)

    def _text(self, batch: Mapping[str, Tensor]) -> TextFeatures:
        """Packed features; rows with `drop` get the unconditional table instead, as in `encode_text`."""
        if "ids" in batch:
            return encode_text(self.text_encoder, self.transformer, batch["ids"], batch["mask"], batch["drop"])
        features, lengths = batch["features"], batch["lengths"]  # (sum of lengths, T), (B,)
        positions = torch.cat([torch.arange(n, device=features.device) for n in lengths.tolist()])  # (sum of lengths,)
        dropped = batch["drop"].repeat_interleave(lengths)[:, None]  # (sum of lengths, 1)
        null = self.transformer.null_text[positions].to(features.dtype)
        return TextFeatures(torch.where(dropped, null, features), tuple(lengths.tolist()))
