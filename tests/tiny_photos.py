"""A tiny model that draws all templates of 0.06M pixels, and a folder of pictures to train its controls on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import T5Config, T5EncoderModel

from scaleweaver import VARControlPipeline
from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.train.vocabulary import train_vocabulary

CAPTIONS = ("a grey stripe on black", "noise of many colours")


def save_photo_model(folder: Path, **transformer: Any) -> Path:
    """A pipeline of the Infinity family with two narrow blocks, as `from_pretrained` reads it."""
    vae = BSQTokenizer(bits=2, stride=16, fold=4, widths=[4, 4, 8], encoder_blocks=1, decoder_blocks=1, norm_groups=4)
    text = T5Config(vocab_size=300, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2)
    sizes = {"bits": 2, "depth": 2, "width": 32, "heads": 2, "text_width": 32, "text_length": 64, "max_scales": 7}
    backbone = InfinityTransformer(**{**sizes, **transformer})
    backbone.init_weights()
    plan = {"family": "infinity", "budget": "0.06M"}
    pipe = VARControlPipeline(backbone, vae, T5EncoderModel(text), train_vocabulary(CAPTIONS, 300), plan)
    pipe.save_pretrained(folder)
    return folder


def picture(number: int, height: int = 64, width: int = 64) -> Image.Image:
    """Blocks of colours, different for every number."""
    cells = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)


def write_photos(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """One captioned picture of each (height, width): 000.png, 000.txt, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(sizes):
        picture(number, height, width).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number}\n\n{CAPTIONS[number % 2]}\n")
    return folder
