"""Estimates: published rows, and agreement with what real runs multiply and hold."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_backbone
from tiny_pipeline import PROMPT, edges, tiny_pipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from scaleweaver.backbones.layers import fuses_gelu
from scaleweaver.cache import FullCache, KVCache, NoCache, SlidingWindow
from scaleweaver.contracts import Control, Route, SamplerState
from scaleweaver.estimate import Estimate, kv_bytes
from scaleweaver.evaluate.memory import MemoryTracker, nbytes, peak_bytes, storage_bytes, without_storage
from scaleweaver.loop import SingleModel
from scaleweaver.lora import add_lora
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.schedule import ScaleSchedule, ScaleStep, infinity_schedule
from scaleweaver.styles import set_styles
from scaleweaver.work import decode_cost

MIB = 2**20
ROOT = Path(__file__).resolve().parent.parent
PAPERS = {"key_bytes": 4, "value_bytes": 2}  # float32 keys, bfloat16 values
BIG, BIGGER = {"layers": 32, "width": 2048}, {"layers": 40, "width": 3584}  # Infinity-2B and -8B


def flops(run: Callable[[], Any]) -> int:
    """What torch counts, with its formulas for the CPU's own attention and fused linear layer added."""
    aten = torch.ops.aten
    mapping: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        mapping[torch.ops.mkldnn._linear_pointwise] = lambda x, w, *_, **__: 2 * prod(x) * w[0]
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("tokens", "rows", "model", "published"),
    [
        (6425, 16, BIG, 38550),  # ScaleKV (arXiv 2505.19602), full cache, 8 pictures with guidance
        (6425, 16, BIGGER, 84328),
        (1300, 16, BIG, 7800),
        (650, 16, BIG, 3900),
        (265, 16, BIG, 1590),
        (1300, 16, BIGGER, 17062),
        (650, 16, BIGGER, 8531),
        (265, 16, BIGGER, 3478),
        (680, 128, {"layers": 16, "width": 1024}, 8160),  # CoDe (arXiv 2411.17787), refiner
    ],
)
def test_published_rows_of_keys_and_values(tokens: int, rows: int, model: dict[str, int], published: int) -> None:
    # the papers print whole numbers, cut or rounded
    assert abs(kv_bytes(tokens, rows=rows, **model, **PAPERS) / MIB - published) < 1  # type: ignore[arg-type]


def test_the_row_that_two_papers_print_differently() -> None:
    # VAR-d30, 64 pictures: 28707 in CoDe and 28677 in VARiant (arXiv 2511.16546)
    ours = kv_bytes(680, layers=30, width=1920, rows=128, **PAPERS) / MIB
    assert ours == 28687.5


def test_history_before_the_last_scale_is_what_the_papers_count() -> None:
    assert infinity_schedule("1.0", "1M").steps[-1].start == 6425


@dataclass
class Measured:
    flops: int
    peak: int
    kv: int
    banks: int


def measure(pipe: VARControlPipeline, prompt: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Measured:
    """A real call: products, tensors alive at most, keys and values before the last scale."""
    counted = flops(lambda: pipe(prompt, seed=1, **arguments))  # also fills what is remembered for later calls
    seen: list[int] = []
    banks: list[int] = []
    attend, reset, conditions = KVCache.attend, KVCache.reset, pipe._conditions

    def watch(cache: KVCache, *given: Any, **named: Any) -> Any:
        seen.append(cache.nbytes())
        return attend(cache, *given, **named)

    def leave(cache: KVCache) -> None:
        seen.append(cache.nbytes())
        reset(cache)

    def made(*given: Any, **named: Any) -> Any:
        result = conditions(*given, **named)
        banks.append(sum(one.bank.nbytes() for one in result.injectors))
        return result

    with monkeypatch.context() as patch, MemoryTracker() as tracker:
        patch.setattr(KVCache, "attend", watch)
        patch.setattr(KVCache, "reset", leave)
        patch.setattr(pipe, "_conditions", made)
        pipe(prompt, seed=1, **arguments)
    return Measured(counted, tracker.peak, max(seen), banks[-1])


def agrees(estimate: Estimate, real: Measured) -> None:
    assert estimate.total_flops == real.flops
    assert estimate.kv_bytes == real.kv
    assert estimate.peak_bytes - estimate.weight_bytes == pytest.approx(real.peak, rel=0.1)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (PROMPT, {"guidance_scale": 1.0}),
    "guidance": (PROMPT, {}),
    "a control": (PROMPT, {"control": {"canny": edges()}}),
    "two controls, weighed apart": (
        PROMPT,
        {"control": {"canny": edges(), "depth": edges(1)}, "control_guidance_scale": 2.0},
    ),
    "a control for some scales": (PROMPT, {"control": Control("canny", edges(), scales=slice(1, 3), end=0.6)}),
    "three of a prompt": (PROMPT, {"num_images_per_prompt": 3}),
    "three prompts": ([PROMPT, "a ball", ""], {"num_images_per_prompt": 2}),
    "a control for each prompt": ([PROMPT, "a ball"], {"control": {"canny": [edges(), edges(1)]}}),
    "guidance that ends": (PROMPT, {"guidance_scale": [3.0, 2.0, 1.0, 1.0], "num_images_per_prompt": 2}),
    "negative": (PROMPT, {"negative_prompt": "small tree house"}),
    "window": (PROMPT, {"cache": SlidingWindow(4)}),
    "no history": (PROMPT, {"cache": NoCache()}),
    "stopped": (PROMPT, {"stop_after": 2}),
    "latent": (PROMPT, {"output_type": "latent"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_a_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("canny", "depth")
    prompt, arguments = CALLS[name]
    real = measure(pipe, prompt, monkeypatch, **arguments)
    agrees(pipe.estimate(prompt, **arguments), real)


@pytest.mark.parametrize("config", [{"scope": "causal"}, {"fusion": "joint"}, {"condition_modulation": "text"}])
def test_agrees_for_every_form_of_control(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_pipeline import add_tiny_control

    pipe = tiny_pipeline()
    add_tiny_control(pipe, **config)
    real = measure(pipe, PROMPT, monkeypatch, control={"canny": edges()})
    agrees(pipe.estimate(PROMPT, control="canny"), real)


def test_agrees_at_more_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8), (11, 11), (14, 14))
    plan = ScaleSchedule(grids, position_grid=(14, 14), stride=8)
    pipe = tiny_pipeline("canny", schedule=plan.to_dict())
    pipe.transformer = tiny_backbone(depth=4, width=64, heads=4)
    pipe.controls.clear()
    real = measure(pipe, PROMPT, monkeypatch, num_images_per_prompt=2)
    estimate = pipe.estimate(PROMPT, num_images_per_prompt=2)
    agrees(estimate, real)
    side = 14 * 8
    work, _ = decode_cost(pipe.vae, side, side)
    assert estimate.flops["decode"] == 2 * work
    assert [scale.history for scale in estimate.scales] == [step.start for step in plan]


def test_agrees_for_the_built_in_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = VARControlPipeline.from_pretrained("toybox")
    pipe.set_progress_bar_config(disable=True)
    picture = edges(0, (128, 128))
    real = measure(pipe, "a red cube on grass", monkeypatch, control={"canny": picture}, num_images_per_prompt=2)
    estimate = pipe.estimate("a red cube on grass", control="canny", num_images_per_prompt=2)
    agrees(estimate, real)
    assert estimate.bank_bytes == {"canny": real.banks}


def unfused(pipe: VARControlPipeline) -> int:
    """How much more the backbone holds than one whose GELU is part of the layer before it, at the last scale."""
    plain = tiny_pipeline().estimate(PROMPT)
    return pipe.estimate(PROMPT).scales[-1].activation_bytes - plain.scales[-1].activation_bytes


def gelu_is_fused() -> bool:
    """Whether oneDNN runs it here at all."""
    with torch.no_grad():
        fc1 = tiny_backbone().blocks[0].ffn.fc1
        return fuses_gelu(fc1, fc1.bias)


def test_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    pipe = tiny_pipeline().quantize("int8")
    assert pipe.estimate(PROMPT).total_flops == tiny_pipeline().estimate(PROMPT).total_flops
    real = measure(pipe, PROMPT, monkeypatch)
    estimate = pipe.estimate(PROMPT)
    assert estimate.kv_bytes == real.kv
    assert estimate.peak_bytes - estimate.weight_bytes == pytest.approx(real.peak, rel=0.1)
    assert (unfused(pipe) > 0) == gelu_is_fused()


def test_a_lora_in_the_feed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    add_lora(pipe.transformer, "style", pattern=r"blocks\.0\.ffn\.fc1", rank=2, alpha=2)
    assert unfused(pipe) == 0  # it is off
    set_styles(pipe.transformer, {"style": 1.0})
    agrees(pipe.estimate(PROMPT), measure(pipe, PROMPT, monkeypatch))
    assert unfused(pipe) > 0


def test_stages_agree_one_by_one() -> None:
    pipe = tiny_pipeline("canny")
    estimate = pipe.estimate(PROMPT, control="canny", previews=1)
    encoded: list[Any] = []
    latent = torch.zeros(1, 3, 8, 8)
    assert estimate.flops["text encoder"] == flops(lambda: pipe.encode_prompt(PROMPT))
    both = flops(lambda: encoded.append(pipe.encode_control(edges(), "canny")))
    assert estimate.flops["control encoder"] + estimate.flops["control prefill"] == both
    assert estimate.decodes == 1 + 4
    assert estimate.flops["decode"] == 5 * flops(lambda: pipe.preview(latent))
    assert estimate.bank_bytes == {"canny": encoded[0].bank.nbytes()}


def test_decoding_large_pictures() -> None:
    """Where a CPU takes a way of its own to double a picture."""
    pipe = tiny_pipeline()
    latent = torch.zeros(1, 3, 32, 48)
    work, between = decode_cost(pipe.vae, 128, 192)
    assert work == flops(lambda: pipe.preview(latent))
    with torch.no_grad():
        assert between == pytest.approx(peak_bytes(lambda: pipe.vae.decode(latent)), rel=0.1)


def test_what_is_at_hand_costs_nothing() -> None:
    pipe = tiny_pipeline("canny")
    encoded = pipe.encode_control(edges(), "canny")
    fresh = pipe.estimate(PROMPT, control="canny")
    reused = pipe.estimate(PROMPT, control={"canny": encoded})
    assert "control prefill" in fresh.flops and "control prefill" not in reused.flops
    assert reused.flops == pipe.estimate(PROMPT, control="canny", reused=True).flops
    assert reused.bank_bytes == fresh.bank_bytes
    plain = pipe.estimate(PROMPT)
    assert pipe.estimate(PROMPT, control=Control("canny", None, scale=0.0)).flops == plain.flops
    assert pipe.estimate(len(pipe.tokenizer(PROMPT)["input_ids"])).flops == plain.flops


def test_some_layers() -> None:
    pipe = tiny_pipeline()
    router = SingleModel(pipe.transformer, layers=(0, 2))
    assert pipe.estimate(PROMPT, router=router).total_flops == flops(lambda: pipe(PROMPT, seed=1, router=router))


def test_a_change_of_networks() -> None:
    pipe = tiny_pipeline()
    second = tiny_backbone(1, depth=2)

    class Two:
        def route(self, step: ScaleStep) -> Route:
            return Route(pipe.transformer if step.index < 2 else second)

    estimate = pipe.estimate(PROMPT, router=Two())
    assert estimate.total_flops == flops(lambda: pipe(PROMPT, seed=1, router=Two()))
    assert estimate.weights["network 2"] == nbytes(second)


@dataclass(frozen=True)
class Scored(FullCache):
    """Keeps tokens by their scores, as published compressions do."""

    def queries(self, layer: int, step: ScaleStep) -> Tensor | None:
        return torch.tensor([0])

    def keep(self, layer: int, step: ScaleStep, tokens: int, scores: Tensor | None) -> Tensor | None:
        assert scores is not None
        return scores.topk(min(tokens, 5)).indices.sort(-1).values


@dataclass(frozen=True)
class Announced(Scored):
    def kept(self, layer: int, step: ScaleStep, tokens: int) -> int:
        return min(tokens, 5)


def test_a_policy_that_looks_at_scores_says_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=r"kept\(layer, step, tokens\)"):
        pipe.estimate(PROMPT, cache=Scored())
    agrees(pipe.estimate(PROMPT, cache=Announced()), measure(pipe, PROMPT, monkeypatch, cache=Announced()))


class FirstHalf:
    """Half of the pictures go on after the second scale."""

    def select(self, state: SamplerState, step: ScaleStep) -> Tensor | None:
        return torch.arange(state.conditions.images // 2) if step.index == 1 else None


class FirstHalfAnnounced(FirstHalf):
    def population(self, step: ScaleStep, images: int) -> int:
        return images // 2 if step.index == 1 else images

    def decodes(self, step: ScaleStep, images: int) -> int:
        return 0


def test_search() -> None:
    pipe = tiny_pipeline()
    known = pipe.estimate(PROMPT, search=FirstHalfAnnounced(), num_images_per_prompt=4)
    assert known.total_flops == flops(lambda: pipe(PROMPT, seed=1, search=FirstHalf(), num_images_per_prompt=4))
    unknown = pipe.estimate(PROMPT, search=FirstHalf(), num_images_per_prompt=4)
    assert "FirstHalf" in unknown.uncounted[0] and unknown.total_flops > known.total_flops


def shapes_alone() -> Any:
    spec = importlib.util.spec_from_file_location("estimate_example", ROOT / "examples" / "estimate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.shapes_alone()


def test_infinity_2b_without_weights() -> None:
    pipe = shapes_alone()
    base = pipe.estimate(128, height=1024, width=1024)
    work = base.flops
    # counted by hand: 28 C^2 per token row and layer, and 4 C per pair of query and key
    assert work["self-attention"] / 1e12 == pytest.approx(35.9, rel=0.01)
    assert work["linear layers"] / 1e12 == pytest.approx(79.1, rel=0.01)
    assert work["decode"] / 1e12 == pytest.approx(9.85, rel=0.01)
    assert base.kv_bytes / MIB == 3212.5  # 2 rows of 6425 tokens, keys and values in bfloat16
    controlled = pipe.estimate(128, control="canny", height=1024, width=1024)
    drawn = sum(
        controlled.flops[kind] for kind in ("linear layers", "self-attention", "control prefill", "reference attention")
    )
    assert drawn / 1e12 == pytest.approx(145.1, rel=0.02)
    assert controlled.bank_bytes["canny"] / MIB == pytest.approx(1315, rel=0.001)
    assert controlled.flops["control encoder"] / 1e12 == pytest.approx(4.16, rel=0.01)


def test_prints_a_table() -> None:
    text = str(tiny_pipeline("canny").estimate(PROMPT, control="canny"))
    for line in ("32x32", "4 scales, 30 tokens", "keys and values", 'control "canny"', "self-attention", "peak"):
        assert line in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 25}, "numbers of tokens from 1 to 24"),
        ({"prompt": PROMPT, "control": "pose"}, '"pose" is not loaded'),
        ({"prompt": PROMPT, "stop_after": 5}, "1 to 4"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline().estimate(**arguments)


def test_tracker_counts_what_is_alive() -> None:
    before = torch.zeros(1000)
    with MemoryTracker() as tracker:
        first = before + 1
        view = first.view(10, 100).t()
        before.add_(1)
        assert tracker.live == first.nbytes
        second = view.contiguous()
        assert tracker.live == 2 * first.nbytes
        del first, view
        assert tracker.live == second.nbytes
    assert tracker.peak == 2 * second.nbytes
    assert storage_bytes([second[:1], second[1:]]) == second.nbytes


def test_peak_of_a_step_by_step_computation() -> None:
    x = torch.zeros(256)
    assert peak_bytes(lambda: ((x + 1) + 1) + 1) == 2 * x.nbytes


def test_a_copy_without_storage() -> None:
    backbone = tiny_backbone()
    bare = without_storage(backbone)
    assert {p.device.type for p in bare.parameters()} == {"meta"} and nbytes(bare) == nbytes(backbone)
    assert {p.device.type for p in backbone.parameters()} == {"cpu"}
