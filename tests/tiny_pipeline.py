"""A whole pipeline of a few thousand parameters: tiny text encoder, backbone, tokenizer and control."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import TEXT_WIDTH, tiny_backbone, tiny_schedule, tiny_vae
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from scaleweaver.adapters import add_control, trainable_parameters
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.pipeline import VARControlPipeline

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "cube", "ball", "on", "grass", "small", "house", "tree"]

PROMPT = "a red cube on grass"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and an end-of-sequence token."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=24
    )


def tiny_text_encoder(seed: int = 0) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T5EncoderModel(config).eval()


def add_tiny_control(pipe: VARControlPipeline, name: str = "canny", seed: int = 0, **config: Any) -> None:
    """A control whose weights are random, so that it does act."""
    adapter = add_control(pipe.transformer, ScaleWeaverConfig(**{"kind": name, "lora_rank": 2, **config}), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(pipe.transformer, adapter, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            parameter.requires_grad_(False)
    pipe.controls[name] = adapter


def tiny_pipeline(*controls: str, **config: Any) -> VARControlPipeline:
    """A pipeline for 32x32 pictures in four scales, with a random control of each name."""
    pipe = VARControlPipeline(
        transformer=tiny_backbone(),
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        **{"schedule": tiny_schedule().to_dict(), "temperature": 1.0, "top_p": 0.0, **config},
    )
    for seed, name in enumerate(controls):
        add_tiny_control(pipe, name, seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edges(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Random black and white lines, width x height."""
    width, height = size
    return Image.fromarray((np.random.default_rng(seed).random((height, width)) < 0.3).astype(np.uint8) * 255)


def latent(pipe: VARControlPipeline, prompt: Any = PROMPT, **arguments: Any) -> Tensor:
    """What a call draws, before the decoder."""
    return pipe(prompt, **{"seed": 1, "output_type": "latent", **arguments}).latent
