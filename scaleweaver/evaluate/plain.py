"""The same network as a plain eager implementation: the baseline that speed is compared with.

Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (arXiv 2412.04431), written from
its formulas, over the weights of our modules and without copies of them, but with the habits of the original code:
lengths and rotations of queries and keys in float32 on stacked pairs, float32 keys in a cache that is joined anew at
every scale (the last one too), keys and values of the prompt made again in every layer at every scale, both guidance
rows to the end, a class for each value of a bit, top-k and top-p by sorting, nothing in place, and a decoder whose
tensors lie channel by channel. It draws what the pipeline draws, up to rounding. No controls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.backbones.layers import Block, SelfAttention
from scaleweaver.cache import KVCache
from scaleweaver.contracts import TextFeatures
from scaleweaver.guidance import per_scale
from scaleweaver.kernels.bit_sampling import sample_bits
from scaleweaver.kernels.qkv_rope import Rope, qkv_rope
from scaleweaver.sampling import exponential
from scaleweaver.schedule import ScaleSchedule, ScaleStep
from scaleweaver.tokenizers.autoencoder import Level, ResidualBlock, Upsample
from scaleweaver.tokenizers.bsq import BSQTokenizer

Pair = tuple[Tensor, Tensor]


class PlainInfinity:
    """Pictures from text features, the plain way.

    Each switch takes one habit away, to see what that alone is worth: `text_once` keeps keys and values of the prompt,
    `in_place_cache` uses the product's cache, which joins nothing but at the last scale and keeps nothing of that one,
    `one_rotation` turns queries and keys together in one float32 copy, `fused_gelu` applies it inside the product,
    `one_logit` has one logit for each bit and draws without sorting. Of the decoder, `channels_last` lays tensors out
    pixel by pixel and `folded_upsampling` smooths without repeating pixels first. `autocast` is the format that the
    original multiplies in on a GPU, bfloat16; None computes in that of the weights.
    """

    def __init__(
        self,
        transformer: InfinityTransformer,
        vae: BSQTokenizer,
        *,
        text_once: bool = False,
        in_place_cache: bool = False,
        one_rotation: bool = False,
        fused_gelu: bool = False,
        one_logit: bool = False,
        channels_last: bool = False,
        folded_upsampling: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.transformer, self.vae = transformer, vae
        self.text_once, self.in_place_cache, self.one_rotation = text_once, in_place_cache, one_rotation
        self.fused_gelu, self.one_logit = fused_gelu, one_logit
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.folded_upsampling = folded_upsampling
        self.autocast = autocast
        self.heads: int = transformer.config["heads"]
        self.eps: float = transformer.config["norm_eps"]
        # a weight that lies channels-last would draw the whole convolution there
        layers = (m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))
        self._kernels = {layer: layer.weight.detach().contiguous(memory_format=self.layout) for layer in layers}

    @torch.inference_mode()
    def generate(
        self,
        features: TextFeatures,
        schedule: ScaleSchedule,
        *,
        generators: Sequence[torch.Generator],
        images: int = 1,
        guidance_scale: float | Sequence[float] = 3.0,
        temperature: float | Sequence[float] = 0.5,
        top_k: int = 0,
        top_p: float = 0.97,
        forced: Sequence[Tensor] = (),
        on_scale: Callable[[ScaleStep, Tensor, Tensor], Any] | None = None,
    ) -> Tensor:
        """The latent (B, d, Hl, Wl) of `images` pictures per prompt, one generator each.

        forced: bits (B, n, N) in place of the drawn ones at leading scales. on_scale(step, logits, latent) is called
        after every scale with the guided logits (B, L, N, 2) of both values of each bit, (B, L, N) with `one_logit`.
        """
        weights = per_scale(guidance_scale, len(schedule), "guidance_scale")
        temperatures = per_scale(temperature, len(schedule), "temperature")
        branches = 1 if set(weights) == {1.0} else 2
        count = len(features) * images
        device = self.transformer.null_text.device
        latent = torch.zeros(count, self.vae.target.bits, *self.vae.target.final_grid(schedule), device=device)
        with self._autocast(device):
            text, lengths = self._packed(features, images, branches)
            pooled = self._pool(text, lengths)  # (R, C)
            prompt = self.transformer.text_proj(text)  # (sum, C)
            run = _Run(prompt, lengths)
            shared = self._exact(self.transformer.shared_modulation, F.silu(pooled)).unflatten(-1, (6, -1))[:, None]
            for step in schedule.steps:
                x = self._embed(latent, pooled, step, branches)  # (R, L, C)
                for layer, block in enumerate(self.transformer.blocks):
                    x = self._block(block, layer, x, shared, step, run)
                logits = self._head(x, pooled) / temperatures[step.index]  # (R, L, N, 2), or (R, L, N)
                conditional = logits[:count]
                if weights[step.index] != 1:
                    conditional = weights[step.index] * conditional + (1 - weights[step.index]) * logits[count:]
                draw = _draw if self.one_logit else _sample
                bits = draw(conditional, top_k, top_p, generators)  # (B, L, N)
                if step.index < len(forced):
                    bits = forced[step.index].to(bits)
                latent = latent + self._lifted(bits, latent, step)
                if on_scale is not None:
                    on_scale(step, conditional, latent)
        return latent

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, d, Hl, Wl) -> pictures (B, 3, H, W) in [0, 1], all at once."""
        decoder = self.vae.decoder
        with self._autocast(latent.device):
            latent = latent.to(self.vae.dtype).contiguous(memory_format=self.layout)
            x = self._conv(decoder.conv_in, latent)
            x = self._residual(decoder.mid.block_2, self._residual(decoder.mid.block_1, x))
            for level in reversed(decoder.up):
                assert isinstance(level, Level)
                for block in level.block:
                    x = self._residual(block, x)
                if level.upsample is not None:
                    x = self._upsample(level.upsample, x)
            pictures = F.pixel_shuffle(self._conv(decoder.conv_out, _swish(decoder.norm_out(x))), decoder.fold)
            if decoder.shortcut is not None:
                layer = decoder.shortcut
                linear = F.conv_transpose2d(latent, self._kernels[layer], layer.bias, layer.stride)
                pictures = pictures + linear
        return (pictures.float().clamp(-1, 1) + 1) / 2  # (B, 3, H, W)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def _packed(self, features: TextFeatures, images: int, branches: int) -> tuple[Tensor, list[int]]:
        """Normalised text of all rows in one matrix (sum of lengths, T), and their lengths."""
        model = self.transformer
        prompts = features.features.to(model.null_text.device).float().split(features.lengths)
        rows = [row for row in prompts for _ in range(images)]
        if branches == 2:
            rows += [model.null_text[: len(row)].float() for row in rows]
        x = torch.cat(rows)  # (sum, T)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * model.text_norm.weight.float()
        return x.to(model.text_pool.kv.weight.dtype), [len(row) for row in rows]

    def _pool(self, text: Tensor, lengths: Sequence[int]) -> Tensor:
        pool = self.transformer.text_pool
        k, v = pool.kv(text).chunk(2, dim=-1)  # (sum, C)
        k, v = (_padded(x, lengths, pool.query.shape[1]) for x in (k, v + pool.v_bias))  # (R, H, P, D)
        q = pool.query.to(v.dtype).unsqueeze(2).expand(len(lengths), -1, -1, -1)  # (R, H, 1, D)
        o = F.scaled_dot_product_attention(q, k.to(v.dtype), v, attn_mask=_mask(lengths, v.device))
        pooled: Tensor = pool.proj(o.flatten(1)).float()  # (R, C)
        return pooled

    def _embed(self, latent: Tensor, pooled: Tensor, step: ScaleStep, branches: int) -> Tensor:
        model = self.transformer
        if step.index == 0:
            x = (pooled[:, None] + model.first_position).expand(-1, step.n, -1)  # (R, L, C)
        else:
            small = latent
            if latent.shape[-2:] != self.vae.target.grid(step):
                small = F.interpolate(latent, size=self.vae.target.grid(step), mode="bilinear")  # (B, d, ph, pw)
            tokens = F.pixel_unshuffle(small, self.vae.target.patch).flatten(2).transpose(1, 2)  # (B, L, N)
            x = model.code_embed(tokens.to(model.code_embed.weight.dtype)).repeat(branches, 1, 1)  # (R, L, C)
        level = torch.full((1, step.n), step.index, device=x.device)
        embedded: Tensor = x + model.level_embed(level)
        return embedded

    def _block(self, block: Block, layer: int, x: Tensor, shared: Tensor, step: ScaleStep, run: _Run) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (shared + block.modulation).unbind(2)  # (R, 1, C) each
        y = self._norm(x) * (1 + scale1) + shift1
        x = x + gamma1 * self._self_attention(block, layer, y, step, run)
        norm = block.cross_norm
        y = F.layer_norm(x.float(), norm.weight.shape, norm.weight.float(), norm.bias.float(), norm.eps)
        x = x + self._cross_attention(block, layer, y, run).float()
        y = self._norm(x) * (1 + scale2) + shift2
        ffn = block.ffn
        if self.fused_gelu:
            branch: Tensor = ffn(y)
        else:
            branch = ffn.fc2(F.gelu(ffn.fc1(y.to(ffn.fc1.weight.dtype)), approximate="tanh"))
        return x + gamma2 * branch

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)

    def _self_attention(self, block: Block, layer: int, y: Tensor, step: ScaleStep, run: _Run) -> Tensor:
        attn = block.attn
        qkv = attn.qkv(y.to(attn.qkv.weight.dtype))  # (R, L, 3C)
        rope = self.transformer.rope((step,))
        room = run.cache.room(layer, (step,), qkv, self.heads) if self.in_place_cache else None
        if self.one_rotation:
            q, k, v = qkv_rope(qkv, attn.q_bias, attn.v_bias, attn.log_scale, rope, into=room)  # (R, H, L, D)
        else:
            q, k, v = self._turned(qkv, attn, rope)  # (R, H, L, D), queries and keys float32
            k, v = (k, v) if room is None else (room[0].copy_(k), room[1].copy_(v))
        if self.in_place_cache:
            o, _ = run.cache.attend(layer, (step,), q, k, v)  # (R, H, L, D)
        else:
            if layer in run.history:
                k = torch.cat((run.history[layer][0], k), dim=2)  # (R, H, T, D) float32
                v = torch.cat((run.history[layer][1], v), dim=2)
            run.history[layer] = (k, v)
            o = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=1.0)  # (R, H, L, D)
        out: Tensor = attn.proj(o.transpose(1, 2).flatten(2))  # (R, L, C)
        return out

    def _turned(self, qkv: Tensor, attn: SelfAttention, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
        q, k, v = (qkv + bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (R, H, L, D)
        length = attn.log_scale.float().clamp(max=math.log(100)).exp()[:, None, None]  # (H, 1, 1)
        q = F.normalize(q.float(), dim=-1) * length
        k = F.normalize(k.float(), dim=-1)
        q, k = _rotate(torch.stack((q, k)), *rope)  # (R, H, L, D) float32
        return q, k, v.to(qkv.dtype)

    def _cross_attention(self, block: Block, layer: int, y: Tensor, run: _Run) -> Tensor:
        cross = block.cross
        if self.text_once and layer in run.text:
            k, v = run.text[layer]
        else:
            packed_k, packed_v = cross.kv(run.prompt).chunk(2, dim=-1)  # (sum, C)
            k, v = (_padded(x, run.lengths, self.heads) for x in (packed_k, packed_v + cross.v_bias))  # (R, H, P, D)
            if self.text_once:
                run.text[layer] = (k, v)
        q = cross.q(y.to(cross.q.weight.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (R, H, L, D)
        o = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=_mask(run.lengths, q.device))
        out: Tensor = cross.proj(o.transpose(1, 2).flatten(2))  # (R, L, C)
        return out

    def _head(self, x: Tensor, pooled: Tensor) -> Tensor:
        model = self.transformer
        scale, shift = self._exact(model.head_modulation, F.silu(pooled))[:, None].chunk(2, dim=-1)  # (R, 1, C)
        y = self._norm(x) * (1 + scale) + shift  # (R, L, C)
        if self.one_logit:
            weight, bias = (p[1::2] - p[0::2] for p in (model.head.weight, model.head.bias))
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(y.to(weight.dtype), weight, bias).float()  # (R, L, N)
        logits = self._exact(model.head, y)  # (R, L, 2N)
        return logits.view(*logits.shape[:2], -1, 2)  # (R, L, N, 2)

    def _exact(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """In the precision of the weights, float32 in the original."""
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = layer(x.to(layer.weight.dtype)).float()
            return result

    def _lifted(self, bits: Tensor, latent: Tensor, step: ScaleStep) -> Tensor:
        """Codes of the bits (B, L, N) at the size of the latent."""
        codes = (bits.float() * 2 - 1) / math.sqrt(latent.shape[1])
        codes = F.pixel_shuffle(codes.transpose(1, 2).unflatten(2, (step.h, step.w)), self.vae.target.patch)
        return codes if step.is_last else F.interpolate(codes, size=latent.shape[-2:], mode="bilinear")

    def _conv(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self._kernels[layer], layer.bias, layer.stride, layer.padding)

    def _upsample(self, layer: Upsample, x: Tensor) -> Tensor:
        if self.folded_upsampling:
            done: Tensor = layer(x)
            return done
        return self._conv(layer.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def _residual(self, block: Any, x: Tensor) -> Tensor:
        assert isinstance(block, ResidualBlock)
        y = self._conv(block.conv1, _swish(block.norm1(x)))
        y = self._conv(block.conv2, _swish(block.norm2(y)))
        short = block.nin_shortcut
        return (self._conv(short, x) if isinstance(short, nn.Conv2d) else x) + y


class _Run:
    """What one call remembers between scales."""

    def __init__(self, prompt: Tensor, lengths: Sequence[int]) -> None:
        self.prompt, self.lengths = prompt, lengths  # (sum of lengths, C)
        self.history: dict[int, Pair] = {}  # per layer, (R, H, T, D)
        self.text: dict[int, Pair] = {}  # per layer, (R, H, P, D)
        self.cache = KVCache()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (2, R, H, L, D) turned by the angles (L, D/2) of each token, in interleaved pairs."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (2, R, H, L, D/2)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2)


def _sample(logits: Tensor, top_k: int, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Both values of each bit (B, L, N, 2) -> one of them, (B, L, N)."""
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p > 0:
        ordered, index = logits.sort(dim=-1)
        rare = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        rare[..., -1] = False
        logits = logits.masked_fill(rare.scatter(-1, index, rare), -torch.inf)
    p = logits.softmax(-1)
    # what torch.multinomial computes, with the noise of each picture from its own generator
    return (p / exponential(p.shape, generators, p.device)).argmax(-1)


def _draw(logits: Tensor, top_k: int, top_p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Log-odds (B, L, N), divided by the temperature -> bits (B, L, N), as the product draws them."""
    noise = None if top_k == 1 else exponential((*logits.shape, 2), generators, logits.device)
    return sample_bits(logits, noise, top_p=top_p)


def _padded(packed: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    """(sum of lengths, C) -> (R, H, P, D), zeros behind the shorter rows."""
    rows = pad_sequence(packed.split(list(lengths)), batch_first=True)  # (R, P, C)
    return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)


def _mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """(R, 1, 1, P), True on real tokens; None if all rows are equally long."""
    if min(lengths) == max(lengths):
        return None
    real = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    return real[:, None, None]


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
