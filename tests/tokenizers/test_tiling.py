"""Decoding in tiles: the picture of the whole, and how much is alive on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from scaleweaver.evaluate.memory import peak_bytes
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.tokenizers.tiling import Tiles


def tokenizer(seed: int = 0, **config: Any) -> BSQTokenizer:
    """Three levels, every parameter random, norms too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"bits": 4, "stride": 4, "widths": (8, 16, 16), "decoder_blocks": 2, "norm_groups": 4}
        vae = BSQTokenizer(**{**sizes, **config})
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return vae.eval().requires_grad_(False)


def drawn(rows: int = 1, height: int = 12, width: int = 18) -> Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(1))


def peak(decode: Callable[[], Tensor]) -> int:
    with torch.inference_mode():
        return peak_bytes(decode)


@pytest.mark.parametrize("config", [{}, {"fold": 2, "stride": 8}, {"shortcut": True}, {"widths": (8, 8, 8)}])
@pytest.mark.parametrize("size", [8, 12, 20, 40])
def test_exact_tiles_give_the_picture_of_the_whole(config: dict[str, Any], size: int) -> None:
    vae = tokenizer(**config)
    whole, tiled = vae.decode(drawn(2)), Tiles(size, 4).decode(vae, drawn(2))
    assert tiled.shape == whole.shape and tiled.dtype == torch.float32 and whole.std() > 0.2
    assert_close(tiled, whole, atol=2e-5, rtol=0)


def test_layouts_and_formats() -> None:
    vae = tokenizer()
    whole = vae.decode(drawn())
    vae.to(memory_format=torch.channels_last)
    assert_close(Tiles(12, 4).decode(vae, drawn()), whole, atol=2e-5, rtol=0)
    vae.to(torch.bfloat16)
    half, tiled = vae.decode(drawn()), Tiles(12, 4).decode(vae, drawn())
    assert (tiled - whole).square().mean() < 2 * (half - whole).square().mean()  # rounding, as in the whole


def test_a_picture_that_fits_is_decoded_as_it_is() -> None:
    vae = tokenizer()
    for exact in (True, False):
        assert torch.equal(Tiles(72, exact=exact).decode(vae, drawn()), vae.decode(drawn()))


def test_blended_tiles_have_no_seams_but_other_statistics() -> None:
    vae = tokenizer()
    whole, tiled = vae.decode(drawn()), Tiles(32, 16, exact=False).decode(vae, drawn())
    apart = (tiled - whole).abs()
    assert tiled.shape == whole.shape and 1e-3 < apart.mean() < 0.5 * whole.std()
    # without norms a pixel depends on what is near it alone, and the middle of a tile is that of the whole
    for module in vae.decoder.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    whole, tiled = vae.decode(drawn()), Tiles(32, 16, exact=False).decode(vae, drawn())
    assert_close(tiled[:, :, :4, :4], whole[:, :, :4, :4], atol=1e-5, rtol=0)


def test_constant_latents_stay_constant() -> None:
    vae = tokenizer()
    flat = torch.ones(1, 4, 16, 16) * torch.linspace(-1, 1, 4)[None, :, None, None]
    inner = Tiles(32, 8, exact=False).decode(vae, flat)[:, :, 28:36, 28:36]
    assert inner.std(dim=(2, 3)).max() < 0.2


def test_smaller_tiles_need_less_memory() -> None:
    vae, latent = tokenizer(), drawn(height=32, width=32)
    whole = peak(lambda: vae.decode(latent))
    exact = [peak(lambda size=size: Tiles(size, 8).decode(vae, latent)) for size in (64, 32, 16)]
    blended = [peak(lambda size=size: Tiles(size, 8, exact=False).decode(vae, latent)) for size in (64, 32, 16)]
    assert whole > exact[0] > exact[1] > exact[2]
    assert whole > blended[0] > blended[1] > blended[2]
    finest = latent[0, 0].numel() * 4 * 4 * 4 * 16  # bytes of the widest activation of full size
    assert exact[2] < 3 * finest < whole and blended[2] < finest


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (64, -1), (64, 33)])
def test_tiles_that_make_no_sense(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="at most half"):
        Tiles(size, overlap)
