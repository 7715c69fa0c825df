"""The plain baseline is the same network: what it draws is what the pipeline draws, up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline
from torch import Tensor

from scaleweaver.contracts import TextFeatures
from scaleweaver.evaluate.plain import PlainInfinity
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import ScaleSchedule, ScaleStep

ALL = ("text_once", "in_place_cache", "one_rotation", "fused_gelu", "one_logit", "channels_last", "folded_upsampling")
HABITS: list[dict[str, bool]] = [{}, *({name: True} for name in ALL), dict.fromkeys(ALL, True)]


class Listening(BitwiseSampler):
    """Draws as ever and remembers from what."""

    def sample(self, logits: Tensor, step: ScaleStep, generators: Any) -> Tensor:
        heard.append(self.tempered(logits, step).clone())
        return super().sample(logits, step, generators)


heard: list[Tensor] = []


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7 + i) for i in range(count)]


def compare(
    pipe: VARControlPipeline,
    text: TextFeatures,
    schedule: ScaleSchedule,
    plain: PlainInfinity,
    images: int = 1,
    **numbers: Any,
) -> tuple[Any, Tensor, float]:
    """What the pipeline draws, the plain latent, and the largest difference of guided log-odds, teacher-forced."""
    heard.clear()
    sampler = Listening(**{name: numbers[name] for name in ("temperature", "top_k", "top_p") if name in numbers})
    drawn = pipe(
        prompt_embeds=text, schedule=schedule, guidance_scale=numbers["guidance_scale"], sampler=sampler, seed=7,
        num_images_per_prompt=images, output_type="latent",
    )  # fmt: skip
    apart: list[float] = []

    def after(step: ScaleStep, logits: Tensor, latent: Tensor) -> None:
        odds = logits if plain.one_logit else logits[..., 1] - logits[..., 0]  # (B, L, N)
        apart.append(float((odds - heard[step.index]).abs().max()))

    call = {**numbers, "images": images}
    count = images * len(text)
    plain.generate(text, schedule, generators=seeds(count), forced=drawn.codes, on_scale=after, **call)
    return drawn, plain.generate(text, schedule, generators=seeds(count), **call), max(apart)


@pytest.mark.parametrize("habits", HABITS)
@pytest.mark.parametrize(
    ("guidance", "top_p", "lengths"), [(3.0, 0.0, (5, 3)), ([1.0, 2.0, 1.5, 1.0], 0.8, (4,)), (1.0, 0.97, (2, 6))]
)
def test_tiny_model(habits: dict[str, bool], guidance: Any, top_p: float, lengths: tuple[int, ...]) -> None:
    pipe = tiny_pipeline()
    plain = PlainInfinity(pipe.transformer, pipe.vae, **habits)
    schedule = ScaleSchedule.from_dict(pipe.config["schedule"])
    numbers = {"guidance_scale": guidance, "temperature": 0.7, "top_p": top_p, "top_k": 900}
    drawn, latent, apart = compare(pipe, tiny_text(lengths), schedule, plain, images=2, **numbers)
    assert apart < 1e-4
    torch.testing.assert_close(latent, drawn.latent, atol=1e-5, rtol=0)
    assert latent.std() > 0.1
    pictures = torch.cat([pipe.vae.decode(one) for one in drawn.latent.split(1)]) / 2 + 0.5
    torch.testing.assert_close(plain.decode(latent), pictures, atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [0, 1])
def test_top_k(top_k: int) -> None:
    pipe = tiny_pipeline()
    plain = PlainInfinity(pipe.transformer, pipe.vae)
    schedule = ScaleSchedule.from_dict(pipe.config["schedule"])
    numbers = {"guidance_scale": 2.0, "temperature": 1.0, "top_p": 0.0, "top_k": top_k}
    drawn, latent, _ = compare(pipe, tiny_text((5,)), schedule, plain, **numbers)
    torch.testing.assert_close(latent, drawn.latent, atol=1e-5, rtol=0)


def test_built_in_model() -> None:
    pipe = VARControlPipeline.from_pretrained("toybox", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    plain = PlainInfinity(pipe.transformer, pipe.vae)
    schedule = ScaleSchedule.from_dict(pipe.config["schedule"])
    text = pipe.encode_prompt("a large red rocket on grass at noon")
    bare = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 0.0}
    _, _, apart = compare(pipe, text, schedule, plain, **bare)
    assert apart < 1e-4
    numbers = {name: pipe.config[name] for name in bare}
    drawn, latent, apart = compare(pipe, text, schedule, plain, **numbers)
    assert apart < 1e-3  # guidance and a low temperature amplify what rounding does
    torch.testing.assert_close(latent, drawn.latent, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.decode(latent), pipe.vae.decode(drawn.latent) / 2 + 0.5, atol=1e-3, rtol=0)


def test_it_shares_the_weights_and_keeps_its_habits() -> None:
    pipe = tiny_pipeline()
    schedule = ScaleSchedule.from_dict(pipe.config["schedule"])
    calls: list[int] = []
    pipe.transformer.blocks[0].cross.kv.register_forward_hook(lambda *_: calls.append(1))
    for once, expected in ((False, len(schedule)), (True, 1)):
        calls.clear()
        plain = PlainInfinity(pipe.transformer, pipe.vae, text_once=once)
        plain.generate(tiny_text((4,)), schedule, generators=seeds(1))
        assert len(calls) == expected
    assert plain._kernels[pipe.vae.decoder.conv_in].data_ptr() == pipe.vae.decoder.conv_in.weight.data_ptr()


def test_autocast_draws_the_same_kind_of_picture() -> None:
    """In bfloat16 the numbers differ, but by its rounding alone."""
    pipe = tiny_pipeline()
    schedule = ScaleSchedule.from_dict(pipe.config["schedule"])
    found: dict[Any, list[Tensor]] = {None: [], torch.bfloat16: []}
    forced = [torch.ones(1, step.n, pipe.transformer.config["bits"], dtype=torch.uint8) for step in schedule.steps]
    for autocast, logits in found.items():
        plain = PlainInfinity(pipe.transformer, pipe.vae, autocast=autocast)
        plain.generate(
            tiny_text((4,)), schedule, generators=seeds(1), guidance_scale=1.0, temperature=1.0, forced=forced,
            on_scale=lambda step, x, latent, logits=logits: logits.append(x),
        )  # fmt: skip
    exact, rounded = (torch.cat([x.flatten() for x in logits]) for logits in found.values())
    error = float((exact - rounded).norm() / exact.norm())
    assert 0 < error < 0.05
