"""Real models of a few thousand parameters, and recorded numbers of published code, for all tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.contracts import TextFeatures
from scaleweaver.convert.keymap import infinity_state_dict
from scaleweaver.schedule import ScaleSchedule

if TYPE_CHECKING:
    from scaleweaver.tokenizers.bsq import BSQTokenizer

TEXT_WIDTH = 16
BITS, PATCH, STRIDE = 3, 2, 4  # of the tokenizer: 12 bits and 8x8 pixels per transformer token

_HERE = Path(__file__).parent / "golden"
_FULL = Path(__file__).parents[2] / "shared" / "golden"


def tiny_schedule() -> ScaleSchedule:
    """Four square scales of 30 tokens, pictures of 32x32."""
    return ScaleSchedule(((1, 1), (2, 2), (3, 3), (4, 4)), position_grid=(4, 4), stride=STRIDE * PATCH)


def tiny_backbone(seed: int = 0, **config: Any) -> InfinityTransformer:
    """An Infinity transformer in eval mode whose every parameter is random, gates and biases too; fits `tiny_vae`."""
    sizes = {"depth": 3, "width": 32, "heads": 2, "bits": BITS * PATCH**2, "text_width": TEXT_WIDTH, "text_length": 24}
    model = InfinityTransformer(**{**sizes, **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim == 2 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def tiny_vae(seed: int = 0) -> BSQTokenizer:
    """A residual bitwise tokenizer in eval mode for `tiny_schedule`."""
    from scaleweaver.tokenizers.bsq import BSQTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = BSQTokenizer(
            bits=BITS, stride=STRIDE, widths=(8, 8, 16), patch=PATCH, encoder_blocks=1, decoder_blocks=1, norm_groups=4
        )
    return vae.eval()


def tiny_text(lengths: Sequence[int] = (5, 3), seed: int = 0) -> TextFeatures:
    """Text states of prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(torch.randn(sum(lengths), TEXT_WIDTH, generator=generator), tuple(lengths))


def log_odds(pairs: Tensor) -> Tensor:
    """What the original's two classes per bit say of 1 against 0: (..., 2N) -> (..., N)."""
    return pairs[..., 1::2] - pairs[..., ::2]


@dataclass(frozen=True)
class Recording:
    """Recorded numbers of published code: tensors by name, sizes, and facts of each run."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    cases: dict[str, Any]

    def backbone(self) -> InfinityTransformer:
        """The recorded Infinity model, in eval mode."""
        official = {name[len("weights.") :]: t for name, t in self.tensors.items() if name.startswith("weights.")}
        model = InfinityTransformer(
            depth=self.config["depth"],
            width=self.config["embed_dim"],
            heads=self.config["num_heads"],
            bits=self.config["vocab_logits"] // 2,
            text_width=self.config["text_channels"],
            text_length=self.config["text_maxlen"],
        )
        model.load_state_dict(infinity_state_dict(official))
        return model.eval()

    def text(self, which: str = "text") -> TextFeatures:
        """The recorded prompts, "text" or "negative"."""
        lengths = self.tensors[f"inputs.{which}.lens"].tolist()
        return TextFeatures(self.tensors[f"inputs.{which}.features"], tuple(lengths))


def recording(name: str) -> Recording:
    """A recording by file name; the small copy beside the tests unless the complete file lies next to the checkout."""
    path = next(path for path in (_FULL / f"{name}.safetensors", _HERE / f"{name}.safetensors") if path.exists())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Recording(tensors, json.loads(metadata["config"]), json.loads(metadata.get("cases", "{}")))
