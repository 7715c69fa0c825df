"""Recipe "tokenizer": the BSQ autoencoder on pictures and on the control maps it will have to carry.

Loss: L1 on pixels + L1 on horizontal and vertical pixel differences (edges are what canny control needs, and plain L1
blurs them) + commitment of the encoder output to the quantised latent - entropy of the codes over the batch.
Inferred: the paper trains with perceptual and adversarial losses on photographs; the difference loss replaces them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from scaleweaver.controls.canny import canny
from scaleweaver.evaluate.control import canny_f1, psnr
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.data import Renders, as_pixels, random_control_map, save_grid, to_images


class TokenizerLoss(nn.Module):
    """Reconstruction loss of the tokenizer; forward(images (B, 3, H, W) in [-1, 1], seed) -> loss and its parts."""

    def __init__(
        self, vae: BSQTokenizer, schedule: ScaleSchedule, difference: float, commitment: float, entropy: float
    ):
        super().__init__()
        self.vae, self.schedule = vae, schedule
        self.difference, self.commitment, self.entropy = difference, commitment, entropy

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.vae.encoder.conv_out.weight.requires_grad:  # the codes stay as they are, the decoder alone learns
            with torch.no_grad():
                latent = self.vae.quantize(self.vae.encode(images), self.schedule)[1]
            pixel, edges = self._differences(self.vae.decoder(latent), images)
            return pixel + self.difference * edges, {"l1": pixel.detach(), "edges": edges.detach()}
        drawn, code = self.vae(images, self.schedule)
        pixel, edges = self._differences(drawn, images)
        commitment = code.commitment[-1]
        entropy = code.entropy.mean()
        loss = pixel + self.difference * edges + self.commitment * commitment + self.entropy * entropy
        return loss, {"l1": pixel.detach(), "commitment": commitment.detach(), "entropy": entropy.detach()}

    @staticmethod
    def _differences(drawn: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean absolute difference of pixels, and of their steps to the right and down."""
        steps = [(drawn.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (2, 3)]
        return (drawn - images).abs().mean(), steps[0] + steps[1]


class TokenizerRecipe:
    """Options: data (renders), val_data, vae (constructor arguments), schedule, maps (fraction of control maps),
    difference, commitment, entropy (loss weights), start_scale (of the shortcuts, see `principal_start`).

    start_from: the folder of a tokenizer to go on with instead of vae. decoder_only: its codes stay what they are, so
    that a transformer trained on them stays right, and the decoder learns to draw them better.
    """

    option_names = frozenset((
        "data", "val_data", "vae", "schedule", "maps", "difference", "commitment", "entropy", "start_scale",
        "start_from", "decoder_only",
    ))  # fmt: skip

    def __init__(self, config: TrainConfig):
        options = config.options.among(self.option_names)
        torch.manual_seed(config.seed)
        self.schedule = ScaleSchedule.from_dict(options["schedule"])
        start = options.get("start_from")
        if options.get("decoder_only") and not start:
            raise ValueError("decoder_only improves a trained tokenizer; name its folder as start_from")
        self.vae = BSQTokenizer.from_pretrained(start).float() if start else BSQTokenizer(**options["vae"])
        self.vae.train().encoder.requires_grad_(not options.get("decoder_only", False))
        self.renders = Renders(options["data"])
        self.held_out = Renders(options["val_data"])
        self.maps: float = options.get("maps", 0.2)
        self.seed = config.seed
        if not start and options["vae"].get("shortcut"):
            principal_start(self.vae, self.batch(0, min(512, len(self.renders))), options.get("start_scale", 0.35))
        self.model: nn.Module = TokenizerLoss(
            self.vae,
            self.schedule,
            options.get("difference", 3.0),
            options.get("commitment", 0.25),
            options.get("entropy", 0.02),
        )
        self.config = config

    def networks(self) -> Iterable[nn.Module]:
        """See `compiled.Compilable`."""
        return [self.vae.encoder, self.vae.decoder]

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        return [{"params": [p for p in self.vae.parameters() if p.requires_grad]}]

    def batch(self, index: int, size: int) -> Tensor:
        rng = np.random.default_rng((self.seed, index))
        rows = self.renders.rows(self.seed, index * size, size)
        pictures = [
            random_control_map(self.renders, row, rng) if rng.random() < self.maps else self.renders.image(row)
            for row in rows
        ]
        return to_images(np.stack(pictures))

    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        pictures = np.stack([self.held_out.image(i) for i in range(min(96, len(self.held_out)))])
        drawn = reconstruct(self.vae, pictures, self.schedule)
        scores = reconstruction_scores(drawn, pictures)
        edges = np.stack([np.asarray(canny(Image.fromarray(p))) for p in pictures[:8]])
        drawn_edges = reconstruct(self.vae, edges, self.schedule)
        save_grid(folder / f"{step:06d}.png", np.concatenate([pictures[:8], drawn[:8], edges, drawn_edges]), columns=8)
        return scores

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(folder / "vae")


@torch.no_grad()
def principal_start(vae: BSQTokenizer, images: Tensor, scale: float, exponent: float = 0.4) -> None:
    """Starts the linear shortcuts at the principal components of patches, and the convolutions at nothing.

    The components are evened out (divided by their standard deviation to the power `exponent`), rotated at random so
    that every bit carries its share, and scaled to the root mean square `scale` that residual codes of +-1/sqrt(d) can
    reach.
    """
    bits, stride = vae.config["bits"], vae.config["stride"]
    patches = F.unfold(images, stride, stride=stride).transpose(1, 2).flatten(0, 1)  # (patches, 3 s s)
    mean = patches.mean(0)
    variance, components = torch.linalg.eigh(torch.cov((patches - mean).T))
    variance, components = variance.flip(0)[:bits].clamp_min(1e-8), components.flip(1)[:, :bits]
    rotation = torch.linalg.qr(torch.randn(bits, bits, generator=torch.Generator().manual_seed(0)))[0]
    spread = variance.sqrt() ** exponent
    analysis = components / spread @ rotation  # (3 s s, bits)
    gain = scale / ((patches - mean) @ analysis).square().mean().sqrt()
    encoder, decoder = vae.encoder, vae.decoder
    if encoder.shortcut is None or decoder.shortcut is None:
        raise ValueError("this tokenizer has no linear shortcut to start from; build it with shortcut=True")
    encoder.shortcut.weight.copy_((analysis * gain).T.unflatten(1, (3, stride, stride)))
    _set(encoder.shortcut.bias, -(mean @ analysis) * gain)
    synthesis = (components * spread @ rotation / gain).T  # (bits, 3 s s)
    decoder.shortcut.weight.copy_(synthesis.unflatten(1, (3, stride, stride)))
    _set(decoder.shortcut.bias, mean.unflatten(0, (3, stride * stride)).mean(1))  # one value a channel
    for convolution in (encoder.conv_out, decoder.conv_out):
        nn.init.zeros_(convolution.weight)
        _set(convolution.bias, torch.zeros(convolution.out_channels))


def _set(bias: Tensor | None, value: Tensor) -> None:
    if bias is not None:
        bias.copy_(value)


@torch.no_grad()
def reconstruct(
    vae: BSQTokenizer, pictures: NDArray[np.uint8], schedule: ScaleSchedule, batch: int = 16
) -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) uint8 through the quantised latent and back."""
    parts = []
    for chunk in np.array_split(pictures, max(1, len(pictures) // batch)):
        images = to_images(chunk).to(vae.device)
        parts.append(as_pixels(vae.decode(vae.quantize(vae.encode(images), schedule)[1])))
    return np.concatenate(parts)


def reconstruction_scores(drawn: NDArray[np.uint8], pictures: NDArray[np.uint8]) -> dict[str, float]:
    """Mean PSNR in dB and canny F1 (strict, 1 px, 2 px) of drawn against true pictures."""
    rows = []
    for a, b in zip(drawn, pictures, strict=True):
        rows.append({"psnr": psnr(a, b)} | dict(canny_f1(a, np.asarray(canny(Image.fromarray(b))))))
    return {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}
