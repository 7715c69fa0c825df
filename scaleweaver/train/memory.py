"""What a control run needs of a device's memory, predicted from its settings without loading a weight.

Per token and block of width C, with a = 2 bytes under autocast and 4 without, the backward pass needs of the frozen
image stream (a linear layer that does not learn keeps no input):

    3 states of the residual stream in float32                                12 C
    queries and keys before they are scaled to length one, in float32          8 C   (without autocast also values, the
                                                                                     biased queries: 16 C)
    queries, keys, values and result of self-attention, queries and result
    of cross-attention                                                       6 a C
    the hidden layer before its GELU                                         a hidden

a block that reads a control adds the result of that attention and its contiguous copy, 2 a C, and a condition block has
the same without cross-attention, and two inputs of layers with LoRA: 4 + 4 + (8 or 16) + 6 a C + a hidden. An
attention with a mask keeps it, a L^2, and only small ones have one; on a CPU in bfloat16 it keeps its weights, (4 + 2)
R H for each pair of query and key that is computed. With gradient checkpointing all that remains of a block is its
float32 input, 4 C, and the keys and values of the bank, 2 a C an injected block; one block at a time is whole. Before
all that the maps go through the tokenizer, five states of its first width and of the picture's size.

Of what learns (n numbers, float32): 4n each for weights, gradients and averages, 8n for AdamW's two moments or
2n + n / 32 in 8 bits. On a GPU add what its driver and the allocator take: 1 GiB is assumed, not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from scaleweaver.adapters import add_control, trainable_parameters
from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.hub import BUILT_IN, locate
from scaleweaver.kernels.interval_attention import computed_pairs, splits
from scaleweaver.masks import Kind, key_ranges
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.precision import read_dtype
from scaleweaver.schedule import RATIOS, ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control import ControlRecipe, wanted_controls
from scaleweaver.train.photo_setup import photo_folder, plan_of

DRIVER = 2**30  # bytes on a GPU, assumed
_TOKENIZER_OF = {"125M": "d16", "2B": "d32", "8B": "d56_f8"}
_FLAN_T5_XL: dict[str, Any] = {
    "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes in one process. `activations` are kept for the backward pass, `working` is used on top of them for a
    moment; `encoding_maps`, `optimizer_step`, `encoding_texts` and `drawing` are what other moments use in their place.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    working: int
    encoding_maps: int
    optimizer_step: int
    encoding_texts: int
    drawing: int
    driver: int
    trained_numbers: int
    tokens: int  # of the largest schedule

    @property
    def lasting(self) -> int:
        """What is there all the time."""
        return self.frozen + self.trained + self.optimizer + self.averages + self.driver

    @property
    def training(self) -> int:
        """The largest moment of a step."""
        forward = max(self.activations + self.working, self.encoding_maps)
        return self.lasting + max(forward + self.gradients, self.gradients + self.optimizer_step)

    @property
    def validation(self) -> int:
        return self.lasting + self.drawing

    @property
    def before(self) -> int:
        """While captions are encoded; optimiser and averages are not there yet."""
        return self.frozen + self.trained + self.driver + self.encoding_texts

    @property
    def peak(self) -> int:
        return max(self.training, self.validation, self.before)

    def rows(self) -> list[tuple[str, int]]:
        """What and how many bytes, as a table."""
        return [
            ("frozen weights", self.frozen),
            (f"trained weights ({self.trained_numbers / 1e6:.1f}M in float32)", self.trained),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("averaged weights", self.averages),
            ("kept for the backward pass", self.activations),
            ("working memory of the step", max(self.working, self.encoding_maps - self.activations)),
            ("driver and allocator, assumed", self.driver),
            ("peak of training", self.training),
            ("peak of drawing validation pictures", self.validation),
            ("peak of encoding captions, before", self.before),
        ]


def estimate(config: TrainConfig, *, device: str = "cuda", processes: int = 1) -> MemoryPlan:
    """The plan of a `control` run on photos with a frozen backbone, for one of so many processes."""
    options = config.options.among(ControlRecipe.option_names)
    if config.recipe != "control" or options.get("backbone_lr_scale", 0.0):
        raise ValueError("memory is predicted for the recipe control with a frozen backbone")
    networks = _networks(options)
    transformer, vae = networks.transformer, networks.vae
    schedules = _schedules(networks.schedule, options)
    adapters: list[Any] = []
    learned: list[nn.Parameter] = []
    for name, settings in wanted_controls(options).items():
        fields = {key: value for key, value in settings.items() if key != "start_from"}
        adapters.append(add_control(transformer, ScaleWeaverConfig.from_dict(fields), name))
        learned += trainable_parameters(transformer, adapters[-1], name).values()
    own, trained = {id(p) for p in learned}, sum(p.numel() for p in learned)
    frozen_size = 4 if read_dtype(options.get("dtype")) in (None, torch.float32) else 2
    rows = config.batch // processes
    longest = max(schedules, key=lambda schedule: schedule.length)
    work = _Work(transformer, vae, adapters, config, options, device, frozen_size, longest)
    pixels = max(schedule.height * schedule.width for schedule in schedules)
    eight_bit = config.optimizer == "adamw_8bit"
    return MemoryPlan(
        frozen=_bytes(transformer, frozen_size, own) + _bytes(vae, frozen_size, set()),
        trained=4 * trained,
        gradients=4 * trained,
        optimizer=2 * trained + trained // 32 if eight_bit else 8 * trained,
        averages=4 * trained,
        activations=work.kept(rows, longest.length),
        working=work.moment(rows, longest.length),
        encoding_maps=work.encoding(rows, pixels),
        # the plain form makes a list of denominators as large as the weights
        optimizer_step=4 * trained if config.optimizer == "adamw" else 0,
        encoding_texts=frozen_size * sum(p.numel() for p in networks.text_encoder.parameters()),
        drawing=work.drawing(min(config.batch, options.get("val_pictures", 24)), longest.length, pixels),
        driver=DRIVER if device == "cuda" else 0,
        trained_numbers=trained,
        tokens=longest.length,
    )


@dataclass(frozen=True)
class _Work:
    """Bytes of the moments of a run; see the top of this file."""

    transformer: Any
    vae: Any
    adapters: list[Any]
    config: TrainConfig
    options: Mapping[str, Any]
    device: str
    frozen_size: int
    schedule: ScaleSchedule

    @property
    def size(self) -> int:
        """Of a number in activations."""
        return self.frozen_size if self.config.precision == "no" else 2

    @property
    def condition_rows(self) -> int:
        """Controls that a row may see at once."""
        return 2 if self.options.get("pairs") and len(self.adapters) > 1 else 1

    def block(self, rows: int, tokens: int, *, condition: bool = False) -> int:
        """All that one block keeps without checkpointing."""
        c, hidden = self.transformer.config["width"], self.transformer.blocks[0].ffn.fc1.out_features
        heads, a = self.transformer.config["heads"], self.size
        before_norm = 8 if a == 2 else 16
        states = 4 + 4 if condition else 12
        per_token = (states + before_norm + 6 * a) * c + a * hidden
        attention = self.attention(rows, heads, self.reference_kind if condition else "block_causal")
        return rows * tokens * per_token + attention

    @property
    def reference_kind(self) -> Kind:
        """Which keys condition tokens and readers of a control see, of several controls most."""
        return "block_causal" if any(adapter.scope == "causal" for adapter in self.adapters) else "same_scale"

    def attention(self, rows: int, heads: int, kind: Kind) -> int:
        """What one attention over all scales keeps beside queries, keys, values and result."""
        ranges, tokens = key_ranges(self.schedule.steps, kind), self.schedule.length
        if self.device == "cpu" and self.size == 2:
            return 6 * rows * heads * computed_pairs(ranges, tokens)
        return 0 if splits(ranges, tokens) else self.size * tokens**2

    def reading(self, rows: int, tokens: int) -> int:
        """What reading one control adds to a block."""
        c, heads = self.transformer.config["width"], self.transformer.config["heads"]
        return rows * tokens * 2 * self.size * c + self.attention(rows, heads, self.reference_kind)

    def kept(self, rows: int, tokens: int) -> int:
        """For the backward pass, by both streams."""
        c, depth = self.transformer.config["width"], self.transformer.config["depth"]
        seeing = rows * self.condition_rows
        injected = [adapter.blocks for adapter in self.adapters]
        readers, condition = max(len(blocks) for blocks in injected), max(blocks[-1] + 1 for blocks in injected)
        first = min(blocks[0] for blocks in injected)  # nothing before it needs a gradient
        if self.options.get("gradient_checkpointing"):
            states = 4 * c * tokens * (rows * depth + seeing * condition)
            bank = 2 * self.size * c * tokens * seeing * readers
            return states + bank + self._head(rows, tokens)
        image = (depth - first) * self.block(rows, tokens)
        stream = (condition - 1) * self.block(seeing, tokens, condition=True)
        last = seeing * tokens * (4 + (8 if self.size == 2 else 16) + 3 * self.size) * c
        return image + stream + last + readers * self.reading(seeing, tokens) + self._head(rows, tokens)

    def moment(self, rows: int, tokens: int) -> int:
        """One block while it is run again, and the gradients that pass through it."""
        c, hidden = self.transformer.config["width"], self.transformer.blocks[0].ffn.fc1.out_features
        passing = rows * tokens * (12 * c + 2 * self.size * hidden)
        if not self.options.get("gradient_checkpointing"):
            return passing
        seeing = rows * self.condition_rows
        return self.block(rows, tokens) + self.reading(seeing, tokens) + passing

    def _head(self, rows: int, tokens: int) -> int:
        """Logits and what the loss makes of them, float32."""
        c, bits = self.transformer.config["width"], self.transformer.config["bits"]
        return rows * tokens * 4 * (2 * c + 7 * bits)

    def encoding(self, rows: int, pixels: int) -> int:
        """The first layers of the tokenizer on all maps, which have the picture's own size."""
        width = self.vae.config["widths"][0] if self.vae.config["fold"] == 1 else self.vae.config["widths"][1]
        # five states of a residual block; autocast on a GPU has two of them, the norm's and the SiLU's, in float32
        number = 14 if self.device == "cuda" and self.config.precision != "no" else 5 * self.size
        return rows * self.condition_rows * pixels // self.vae.config["fold"] ** 2 * width * number

    def drawing(self, rows: int, tokens: int, pixels: int) -> int:
        """Keys and values of all scales and both guidance branches, and the decoder on one picture."""
        if not rows:
            return 0
        c, depth = self.transformer.config["width"], self.transformer.config["depth"]
        readers = max(len(adapter.blocks) for adapter in self.adapters)
        history = 2 * self.frozen_size * c * tokens * rows * (2 * depth + readers)
        return history + self.encoding(1, pixels)


@dataclass(frozen=True)
class _Networks:
    """A model's parts without their numbers."""

    transformer: Any
    vae: Any
    text_encoder: nn.Module
    schedule: Mapping[str, Any]


def _networks(options: Mapping[str, Any]) -> _Networks:
    """From the model's config files, or of the `architecture` where the model is not there yet."""
    model = str(options["model"])
    with torch.device("meta"):
        if model in BUILT_IN or Path(model).is_dir():
            folder = locate(model)
            index = _json(folder / "model_index.json")
            parts = {name: _json(folder / name / "config.json") for name in ("transformer", "vae")}
            text = folder / "text_encoder" / "config.json"
            encoder = T5EncoderModel(T5Config(**_json(text))) if text.is_file() else nn.Module()
            return _Networks(
                InfinityTransformer.from_config(parts["transformer"]), BSQTokenizer.from_config(parts["vae"]),
                encoder, index["schedule"],
            )  # fmt: skip
        preset = options.get("architecture")
        if preset not in _TOKENIZER_OF:
            raise ValueError(
                f"there is no folder {model!r}, and architecture is {preset!r}; pass --model FOLDER, or set "
                f"architecture to one of {', '.join(_TOKENIZER_OF)}"
            )
        return _Networks(
            InfinityTransformer.preset(preset), BSQTokenizer.preset(_TOKENIZER_OF[preset]),
            T5EncoderModel(T5Config(**_FLAN_T5_XL)), {"family": "infinity", "budget": "1M"},
        )  # fmt: skip


def _schedules(own: Mapping[str, Any], options: Mapping[str, Any]) -> list[ScaleSchedule]:
    """All shapes that pictures may have."""
    plan = plan_of(own, options if photo_folder(options.get("data")) or "pixels" in options else {})
    shapes = [float(ratio) for ratio in options.get("ratios") or RATIOS]
    return [plan(round(1000 * math.sqrt(ratio)), round(1000 / math.sqrt(ratio))) for ratio in shapes]


def _bytes(module: nn.Module, size: int, without: set[int]) -> int:
    """Of the weights in a number format; the few that stay float32 count as that."""
    exact = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    return sum(
        parameter.numel() * (4 if any(part in name for part in exact) else size)
        for name, parameter in module.named_parameters()
        if id(parameter) not in without
    )


def _json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
