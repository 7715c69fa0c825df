"""A batch gives the bits that its pictures have alone, and finds those that it cannot answer for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from serve_clients import assert_same, client, metric, picture, post
from tiny import tiny_backbone, tiny_schedule
from tiny_pipeline import edges, tiny_pipeline

from scaleweaver.conditions import make_generators
from scaleweaver.contracts import Control
from scaleweaver.metadata import read_settings
from scaleweaver.request import read_schedule
from scaleweaver.sampling import BitwiseSampler, exponential
from scaleweaver.serve.drawing import Artist
from scaleweaver.serve.exact import ROUNDING, Watch, measured_rounding
from scaleweaver.serve.metrics import Metrics
from scaleweaver.serve.options import ServeOptions
from scaleweaver.serve.orders import ControlSettings, Drawn, Event, Picture, Settings
from scaleweaver.serve.server import running

STEP = tiny_schedule().steps[2]
PROMPTS = ["a red cube on grass", "tree", "a small green ball", "house on grass a red tree"]


@pytest.mark.parametrize("top_k", [0, 1])
def test_a_watched_sampler_draws_the_same_bits(top_k: int) -> None:
    sampler = BitwiseSampler(0.8, top_k, 0.9)
    logits = torch.randn(3, STEP.n, 6, generator=torch.Generator().manual_seed(0)) * 3
    watch = Watch(sampler, ROUNDING)
    expected = sampler.sample(logits, STEP, make_generators(4, 3))
    assert torch.equal(watch.sample(logits, STEP, make_generators(4, 3)), expected)
    assert not watch.doubtful


def test_a_logit_that_ties_with_its_noise_makes_its_picture_doubtful() -> None:
    sampler = BitwiseSampler(0.5)
    logits = torch.full((3, STEP.n, 6), 9.0)
    noise = exponential((*logits.shape, 2), make_generators(1, 3), logits.device)
    tie = 0.5 * (noise[1, 2, 3, 1] / noise[1, 2, 3, 0]).log()  # p_1 e_0 = p_0 e_1 at temperature 0.5
    for distance, found in ((0.2, {1}), (-0.2, {1}), (5.0, set())):
        moved = logits.clone()
        moved[1, 2, 3] = tie + distance * ROUNDING
        watch = Watch(sampler, ROUNDING)
        watch.sample(moved, STEP, make_generators(1, 3))
        assert watch.doubtful == found, distance


@pytest.mark.parametrize("wide", [False, True], ids=["as it is", "all doubtful"])
def test_pictures_of_a_batch_are_those_drawn_alone(wide: bool) -> None:
    pipe, metrics = tiny_pipeline("canny"), Metrics()
    control = ControlSettings("canny", 0.7, 0.0, 1.0, None, 3.0, "crop", False, False)
    settings = Settings(read_schedule(None, pipe.config["schedule"], None, None), temperature=0.9, controls=(control,))
    sent: dict[int, Event] = {}
    maps = [edges(number) for number in (0, 1, 1, 2)]
    pictures = [
        Picture(
            i, text, 20 + i, None, settings, [maps[i].convert("RGB")], [None], send=lambda e: sent.update({e.index: e})
        )
        for i, text in enumerate(PROMPTS)
    ]
    Artist(pipe, metrics, name="tiny", rounding=1e3 if wide else ROUNDING).draw(pictures)
    redrawn = metrics.registry.get_sample_value("scaleweaver_images_redrawn_total")
    assert redrawn == (4 if wide else 0)
    for i, text in enumerate(PROMPTS):
        control_here = Control("canny", maps[i], scale=0.7, control_guidance_scale=3.0)
        alone = pipe(text, seed=20 + i, temperature=0.9, control=control_here).images[0]
        event = sent[i]
        assert isinstance(event, Drawn)
        assert np.array_equal(np.asarray(event.image), np.asarray(alone))
        assert read_settings(event.image) == {**read_settings(alone), "model": "tiny"}


@pytest.mark.parametrize(
    ("options", "calls", "redrawn"),
    [({}, 4, 0), ({"exact": False}, 1, 0), ({"rounding": 1e3}, 5, 4)],
    ids=["one by one", "not exact", "with a bound"],
)
def test_where_rounding_was_not_measured_nothing_is_drawn_together_unasked(
    options: dict[str, Any], calls: int, redrawn: int
) -> None:
    pipe = tiny_pipeline().to(torch.bfloat16)
    with running(pipe, ServeOptions(batch_wait=1.0, max_batch=4, **options)) as url:
        answer = client(url).images.generate(prompt=PROMPTS[0], n=4, extra_body={"seed": 3})
        assert metric(url, "scaleweaver_batch_images_count") == calls
        assert metric(url, "scaleweaver_images_redrawn_total") == redrawn
    assert answer.data is not None
    if options.get("exact", True):
        for number, one in enumerate(answer.data):
            assert_same(one.b64_json, pipe(PROMPTS[0], seed=3 + number).images[0])


def test_the_bound_holds_where_it_was_measured() -> None:
    pipe = tiny_pipeline()
    assert measured_rounding(pipe) == ROUNDING
    assert measured_rounding(pipe.to("meta")) is None
    assert measured_rounding(tiny_pipeline().to(torch.bfloat16)) is None


def test_pictures_name_their_loras_without_places_on_this_machine(tmp_path: Path) -> None:
    style = LoraConfig(r=2, target_modules=r".*attn\.qkv", init_lora_weights=False)
    get_peft_model(tiny_backbone(), style).save_pretrained(tmp_path / "style")  # type: ignore[arg-type]
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path / "style", "style")
    with running(pipe) as url:
        drawn = post(url, {"prompt": PROMPTS[0], "seed": 3})[1]["data"][0]["b64_json"]
    settings = read_settings(pipe(PROMPTS[0], seed=3).images[0])
    assert settings["loras"][0]["source"] == str(tmp_path / "style")
    told = [{**settings["loras"][0], "source": "style"}]
    assert read_settings(picture(drawn)) == {**settings, "model": "model", "loras": told}
