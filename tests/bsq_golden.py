"""Reference numbers of the bitwise tokenizers: the complete file if the checkout has one, else the small copy."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.tokenizers.target import ResidualTarget

SMALL = Path(__file__).parent / "golden"
FULL = Path(__file__).parents[2] / "shared" / "golden"


def our_key(official: str) -> str:
    """Published tensor name -> ours: the inner `.conv` / `.norm` segment is dropped."""
    return re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", official)


@dataclass(frozen=True)
class Golden:
    """Tensors of one reference file, for one picture of it."""

    tensors: dict[str, Tensor]
    config: dict
    case: str
    patch: int

    def get(self, name: str) -> Tensor:
        """A tensor, skipping the test where only the full reference file holds it."""
        key = f"{self.case}.{name}"
        if key not in self.tensors:
            pytest.skip(f"the small copy has no {key}")
        return self.tensors[key]

    def scales(self, name: str) -> list[Tensor]:
        count = sum(key.startswith(f"{self.case}.{name}.") for key in self.tensors)
        return [self.tensors[f"{self.case}.{name}.{k}"] for k in range(count)]

    @property
    def schedule(self) -> ScaleSchedule:
        grids = tuple((int(h), int(w)) for _, h, w in self.get("schedule"))
        return ScaleSchedule(grids, grids[-1])

    @property
    def target(self) -> ResidualTarget:
        return ResidualTarget(self.config["codebook_dim"], self.patch)

    def tokenizer(self) -> BSQTokenizer:
        weights = {our_key(k[8:]): v for k, v in self.tensors.items() if k.startswith("weights.") and "lfq" not in k}
        if not weights:
            pytest.skip("the small copy has no weights for this tokenizer")
        tokenizer = BSQTokenizer(
            bits=self.config["codebook_dim"],
            stride=self.config["patch_size"],
            widths=[self.config["base_ch"] * times for times in self.config["ch_mult"]],
            patch=self.patch,
            encoder_blocks=self.config["num_res_blocks"],
            decoder_blocks=self.config["num_res_blocks"] + 1,
            stem_width=self.config["base_ch"],
        )
        tokenizer.load_state_dict(weights, strict=True)
        return tokenizer.eval()


def load(name: str, case: str) -> Golden:
    path = (FULL if (FULL / name).exists() else SMALL) / name
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return Golden(tensors, config, case, patch=16 // config["patch_size"])
