"""The recipes of the built-in model, run once at a tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import SCHEDULE, TINY, written

from scaleweaver.toybox.store import cache_renders
from scaleweaver.train import run


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Path:
    """The recipes of the built-in model one after the other, two steps each, as a user runs them."""
    folder = tmp_path_factory.mktemp("recipes")
    for split, count in (("train", 5), ("val", 2)):
        cache_renders(
            folder / split,
            split,
            count=count,
            size=32,
            supersample=1,
            captions=2,
            maps=("depth", "keypoints"),
            workers=0,
        )
    pictures = {"data": str(folder / "train"), "val_data": str(folder / "val")}
    data = pictures | {"schedule": SCHEDULE}
    vae = {"bits": 4, "stride": 8, "patch": 2, "fold": 4, "widths": [8, 16], "norm_groups": 4}
    vae |= {"encoder_blocks": 1, "decoder_blocks": 1}
    text = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    transformer = {"depth": 2, "width": 32, "heads": 2, "text_length": 64, "max_scales": 2}
    recipes: dict[str, dict[str, Any]] = {
        "tokenizer": data | {"vae": vae, "maps": 0.5},
        "backbone": data
        | {"vae": str(folder / "tokenizer/result/vae"), "transformer": transformer, "text_encoder": text}
        | {"vocabulary": 300, "lr": 1e-2},
        "control": pictures
        | {"kind": "canny", "model": str(folder / "backbone/result"), "latents": str(folder / "backbone/latents")}
        | {"adapter": {"lora_rank": 2}, "lr": 1e-2},
        "judge": pictures | {"judge": {"widths": [8, 8, 16, 16, 16]}, "workers": 1},
    }
    for name, options in recipes.items():
        run(written(folder, TINY | {"recipe": name, "out": str(folder / name)} | options))
    return folder
