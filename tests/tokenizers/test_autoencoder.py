"""Encoder and decoder: reference numbers, published shapes, small and folded sizes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bsq_golden import Golden, our_key
from torch import nn

from scaleweaver.tokenizers.autoencoder import Decoder, Encoder, Upsample, check_widths, group_norm
from scaleweaver.tokenizers.bsq import PRESETS, BSQTokenizer

PARAMETERS = {"d16": 109_970_579, "d24": 110_044_315, "d32": 110_118_051, "d64": 110_412_995, "d56_f8": 81_624_209}


@torch.no_grad()
def test_encoder_output(golden: Golden) -> None:
    torch.testing.assert_close(
        golden.tokenizer().encode(golden.get("image")), golden.get("encoder_out"), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_decoder_output(golden: Golden) -> None:
    decoded = golden.tokenizer().decode(golden.get("quantized"))
    torch.testing.assert_close(decoded, golden.get("decoded"), atol=1e-4, rtol=0)
    assert decoded.abs().max() == 1  # the references reach the clamp


@pytest.mark.parametrize("preset", PRESETS)
def test_published_names_and_shapes(preset: str, official_tensors: Callable[[str], dict[str, list[int]]]) -> None:
    official = official_tensors("d56_f8_14_patchify" if preset == "d56_f8" else preset)
    with torch.device("meta"):
        tokenizer = BSQTokenizer.preset(preset)
    ours = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    assert ours == {our_key(name): shape for name, shape in official.items()}
    assert len(ours) == len(official)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == PARAMETERS[preset]


@pytest.mark.parametrize(
    ("width", "limit", "groups"), [(512, 32, 32), (48, 32, 24), (16, 32, 16), (20, 8, 5), (7, 4, 1)]
)
def test_norm_groups(width: int, limit: int, groups: int) -> None:
    norm = group_norm(width, limit)
    assert (norm.num_groups, norm.eps) == (groups, 1e-6)


@pytest.mark.parametrize("fold", [1, 2])
def test_small_sizes_keep_the_stride(fold: int) -> None:
    encoder = Encoder(5, (8, 12, 16), stem=4, blocks=1, groups=4, fold=fold)
    decoder = Decoder(5, (8, 12, 16), blocks=1, groups=4, fold=fold)
    images = torch.randn(2, 3, 16 * fold, 24 * fold)
    latent = encoder(images)
    assert latent.shape == (2, 5, 4, 6)
    assert decoder(latent).shape == images.shape
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert (convolutions[0].in_channels, convolutions[0].out_channels) == (3 * fold**2, 4)


@torch.no_grad()
def test_folded_channels_become_pixels_of_their_block() -> None:
    decoder = Decoder(4, (8,), blocks=1, groups=4, fold=2)
    decoder.conv_out.weight.zero_()
    decoder.conv_out.bias.copy_(torch.arange(12.0))  # type: ignore[union-attr]
    picture = decoder(torch.randn(1, 4, 3, 5))
    block = torch.arange(12.0).view(3, 2, 2)  # (3, dy, dx)
    assert torch.equal(picture, block.repeat(1, 3, 5)[None])


def test_widths_must_match_the_stride() -> None:
    check_widths((8, 8, 8), 8, fold=2)
    with pytest.raises(ValueError, match="give a stride of 4, not 8"):
        check_widths((8, 8, 8), 8)
    with pytest.raises(ValueError, match="give a stride"):
        check_widths((), 1)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_smoothing_needs_no_repeated_pixels(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    layer, x = Upsample(6).to(dtype), torch.randn(2, 6, 29, 37).to(dtype)
    want = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    found = layer(x)
    assert not torch.equal(found, want)  # another order of the same sums
    torch.testing.assert_close(found, want, atol=tolerance, rtol=0)
    with torch.enable_grad():
        assert torch.equal(layer(x), want)  # training keeps the plain form


@torch.no_grad()
def test_layout_in_memory_changes_rounding_only() -> None:
    torch.manual_seed(0)
    vae = BSQTokenizer(bits=4, stride=4, widths=(16, 16, 32), norm_groups=4).eval()
    latent = torch.randn(1, 4, 34, 33)
    kept = {name: weight.clone() for name, weight in vae.state_dict().items()}
    found = vae.decode(latent)
    torch.testing.assert_close(found, vae.decoder(latent).clamp(-1, 1), atol=1e-5, rtol=0)
    assert torch.equal(found, vae.decode(latent.contiguous(memory_format=torch.channels_last)))
    assert all(weight.is_contiguous() and torch.equal(weight, kept[name]) for name, weight in vae.state_dict().items())


def test_decoding_leaves_the_latent_alone_and_learns_as_before() -> None:
    torch.manual_seed(0)
    decoder = Decoder(4, (8, 16), blocks=1, groups=4)
    latent = torch.randn(1, 4, 36, 32)
    with torch.no_grad():
        before = latent.clone()
        drawn = decoder(latent)
        assert torch.equal(latent, before)
    learned = decoder(latent)
    torch.testing.assert_close(learned, drawn, atol=1e-5, rtol=0)
    learned.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in decoder.parameters())
