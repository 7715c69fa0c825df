"""Recipe "backbone": the bitwise next-scale transformer and, with it, a small T5 encoder.

Infinity (arXiv 2412.04431): teacher forcing over all scales at once, bitwise self-correction of the history,
cross-entropy per bit weighted by the inverse square root of the scale's tokens, text dropped for one sample in ten
(classifier-free guidance).
Differs from the paper: the text encoder is trained along, since no pretrained one can be shipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.cache import KVCache
from scaleweaver.contracts import TextFeatures
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.data import Renders, as_images, as_latents, as_pixels, fingerprint, latent_reader, save_grid
from scaleweaver.train.losses import bit_loss
from scaleweaver.train.vocabulary import train_vocabulary


class BackboneLoss(nn.Module):
    """Bit cross-entropy; forward({"latent" or "images", "ids", "mask", "drop"}, seed) -> loss, accuracy per scale."""

    def __init__(
        self,
        transformer: InfinityTransformer,
        text_encoder: T5EncoderModel,
        vae: BSQTokenizer,
        schedule: ScaleSchedule,
        strength: float,
        corrected_scales: int,
        by_magnitude: bool = False,
    ):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.target, self.schedule = vae.target, schedule
        self.encode = vae.encode  # the method alone: the tokenizer is no part of what is trained and saved
        self.strength, self.corrected_scales, self.by_magnitude = strength, corrected_scales, by_magnitude

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        text = encode_text(self.text_encoder, self.transformer, batch["ids"], batch["mask"], batch["drop"])
        with torch.no_grad():
            latent = batch["latent"] if "latent" in batch else self.encode(batch["images"])
            noise = torch.Generator(latent.device).manual_seed(seed)
            flips = self.target.draw_flips(
                len(latent), self.schedule, self.strength, self.corrected_scales, noise, latent.device
            )
            forced = self.target.teacher_forcing(latent, self.schedule, flips)
        context = self.transformer.encode_text(text)
        logits = self.transformer(forced.inputs, self.schedule.steps, context, KVCache())
        magnitudes = forced.magnitudes if self.by_magnitude else None
        loss, _, accuracy = bit_loss(logits, forced.labels, self.schedule, magnitudes=magnitudes)
        metrics = {f"accuracy_{i}": a.detach() for i, a in enumerate(accuracy)}
        return loss, metrics


def encode_text(
    encoder: T5EncoderModel, transformer: InfinityTransformer, ids: Tensor, mask: Tensor, drop: Tensor
) -> TextFeatures:
    """Packed features of ids (B, P); rows with `drop` get the unconditional table instead."""
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, P, T)
    null = transformer.null_text[: states.shape[1]].to(states.dtype)
    states = torch.where(drop[:, None, None], null, states)
    return TextFeatures(states[mask.bool()], tuple(mask.sum(1).tolist()))  # (sum of lengths, T)


def decay_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Optimiser groups: the matrices inside blocks (Muon may take them), other matrices, and without weight decay
    vectors, tables and gates, as in Infinity's recipe.
    """
    tables = ("null_text", "first_position", "level_embed", "modulation", "log_scale", "query", "attention_bias")
    hidden: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, p in named:
        table = any(part in name for part in tables) and "shared" not in name
        inside = p.ndim == 2 and ".block" in name  # transformer.blocks.0..., text_encoder.encoder.block.0...
        (plain if p.ndim < 2 or table else hidden if inside else decayed).append(p)
    return [{"params": hidden, "hidden": True}, {"params": decayed}, {"params": plain, "weight_decay": 0.0}]


class BackboneRecipe:
    """Options: data, val_data, vae (folder), latents (cache folder), schedule, transformer (config), text_encoder
    (config), vocabulary (size), strength, corrected_scales, by_magnitude (`bit_loss` weighs bits by the rest that they
    stand for), explicit_captions (share of captions that say everything), text_dropout, empty_prompts; guidance_scale,
    temperature and top_p of the pictures, also kept as the defaults of the result. start_from: a trained pipeline whose
    networks and vocabulary go on learning, instead of fresh ones.
    """

    option_names = frozenset((
        "data", "val_data", "vae", "latents", "schedule", "transformer", "text_encoder", "vocabulary", "strength",
        "corrected_scales", "by_magnitude", "explicit_captions", "text_dropout", "empty_prompts", "guidance_scale",
        "temperature", "top_p", "start_from",
    ))  # fmt: skip

    def __init__(self, config: TrainConfig):
        options = config.options.among(self.option_names)
        torch.manual_seed(config.seed)
        self.config, self.seed = config, config.seed
        self.schedule = ScaleSchedule.from_dict(options["schedule"])
        self.renders, self.held_out = Renders(options["data"]), Renders(options["val_data"])
        self.vae = BSQTokenizer.from_pretrained(options["vae"]).eval().requires_grad_(False)
        # no part of the trained model, so the loop would leave it behind on the CPU
        self.vae.to(PartialState().device)
        latents = Path(options.get("latents", Path(config.out) / "latents"))
        self.latents = latent_reader(latents / "train", self.vae, self.renders)
        self.held_out_latents = latent_reader(latents / "val", self.vae, self.held_out)
        if start := options.get("start_from"):
            self._continue(start)
        else:
            self._begin(options, config)
        self.model: nn.Module = BackboneLoss(
            self.transformer,
            self.text_encoder,
            self.vae,
            self.schedule,
            options.get("strength", 0.3),
            options.get("corrected_scales", len(self.schedule)),
            options.get("by_magnitude", False),
        )
        self.text_dropout: float = options.get("text_dropout", 0.1)
        self.empty_prompts: float = options.get("empty_prompts", 0.02)
        self.explicit: float = options.get("explicit_captions", 0.0)

    def _begin(self, options: Mapping[str, Any], config: TrainConfig) -> None:
        """Fresh networks and a vocabulary learned from the captions."""
        self.tokenizer = _vocabulary(Path(config.out), self.renders, options.get("vocabulary", 1024))
        unread = sorted(set(options["text_encoder"]) - set(T5Config().to_dict()))
        if unread:  # T5Config takes any name
            raise ValueError(f"text_encoder sets {', '.join(unread)}, which T5Config does not know; check the spelling")
        text = T5Config(vocab_size=len(self.tokenizer), dropout_rate=0.0, **options["text_encoder"])
        self.text_encoder = T5EncoderModel(text)
        bits = self.vae.target.width
        self.transformer = InfinityTransformer(text_width=text.d_model, bits=bits, **options["transformer"])
        self.transformer.init_weights()

    def _continue(self, folder: str) -> None:
        """The networks and the vocabulary of a trained pipeline, without its controls."""
        from scaleweaver.pipeline import VARControlPipeline

        pipe = VARControlPipeline.from_pretrained(folder)
        for name in list(pipe.available_controls):
            pipe.unload_control(name)
        if pipe.text_encoder is None or pipe.tokenizer is None:
            raise ValueError(f"start_from: {folder} has no text encoder; name a whole pipeline")
        if pipe.vae.target != self.vae.target:
            raise ValueError(
                f"start_from: {folder} was trained on {pipe.vae.target}, the tokenizer {self.config.options['vae']} "
                f"has {self.vae.target}; train on the tokenizer it knows"
            )
        if _encoder_print(pipe.vae) != _encoder_print(self.vae):
            raise ValueError(
                f"start_from: {folder} was trained on codes of another encoder than that of the tokenizer "
                f"{self.config.options['vae']}; train on the tokenizer it knows (its decoder may be another)"
            )
        self.tokenizer = pipe.tokenizer
        self.text_encoder = pipe.text_encoder.float().train().requires_grad_(True)
        self.transformer = pipe.transformer.float().train().requires_grad_(True)

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        return decay_groups(self.model.named_parameters())

    def batch(self, index: int, size: int) -> Mapping[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        rows = self.renders.rows(self.seed, index * size, size)
        texts = []
        for row in rows:
            wordings = self.renders.captions(row)
            texts.append("" if rng.random() < self.empty_prompts else wordings[rng.integers(len(wordings))])
        full = np.random.default_rng((self.seed, index, 1)).random(size) < self.explicit
        texts = self.renders.told_in_full(rows, texts, full.tolist())
        drop = torch.from_numpy(rng.random(size) < self.text_dropout)
        # pictures that are rendered when read are encoded where the step runs
        pictures = as_images(self.renders, rows) if self.renders.online else as_latents(self.latents(rows))
        return pictures | self._texts(texts, drop)

    def _texts(self, texts: Sequence[str], drop: Tensor) -> dict[str, Tensor]:
        limit = self.transformer.config["text_length"]
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"ids": tokens["input_ids"], "mask": tokens["attention_mask"], "drop": drop}

    def networks(self) -> Iterable[nn.Module]:
        """See `compiled.Compilable`."""
        return self.transformer.blocks

    @torch.no_grad()
    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        count = min(128, len(self.held_out))
        texts = [self.held_out.captions(i)[0] for i in range(count)]
        latents, drop = self.held_out_latents(range(count)), torch.zeros(count, dtype=torch.bool)
        batch = send_to_device(as_latents(latents) | self._texts(texts, drop), self.vae.device)
        corrected, self.model.strength = self.model.strength, 0.0  # type: ignore[assignment]
        loss, metrics = self.model(batch, 0)
        self.model.strength = corrected
        self.draw(folder / f"{step:06d}.png", texts[:32])
        return {"loss": float(loss)} | {k: float(v) for k, v in metrics.items()}

    def pipeline(self) -> Any:
        """The networks as they are, in a pipeline."""
        from scaleweaver.pipeline import VARControlPipeline

        options = self.config.options
        return VARControlPipeline(
            transformer=self.transformer,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            schedule=self.schedule.to_dict(),
            guidance_scale=options.get("guidance_scale", 3.0),
            temperature=options.get("temperature", 1.0),
            top_p=options.get("top_p", 0.0),
        )

    def draw(self, path: Path, texts: Sequence[str]) -> None:
        """A contact sheet of the prompts drawn with seeds 0, 1, ..."""
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe(list(texts), seed=list(range(len(texts))), output_type="pt").images  # (B, 3, H, W) in [0, 1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text("\n".join(texts))
        save_grid(path, as_pixels(pictures * 2 - 1), columns=8)

    def save(self, folder: Path) -> None:
        self.pipeline().save_pretrained(folder)


def _encoder_print(vae: BSQTokenizer) -> str:
    """Of the weights that make the codes, in the number format that models ship in."""
    return fingerprint(deepcopy(vae.encoder).to(torch.bfloat16))


def _vocabulary(out: Path, renders: Renders, size: int) -> PreTrainedTokenizerFast:
    """Trained once per run on the captions, then read back, so that a resumed run has the same ids."""
    folder = out / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        captions = (text for row in range(min(len(renders), 20_000)) for text in renders.captions(row))
        train_vocabulary(captions, size).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
