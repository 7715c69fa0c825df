"""ScaleWeaver's control: what a fresh and a trained adapter do to the backbone, and what they must never do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BITS, PATCH, tiny_backbone, tiny_schedule, tiny_text
from torch import Tensor

from scaleweaver.adapters import add_control, trainable_parameters
from scaleweaver.cache import KVCache
from scaleweaver.methods.scaleweaver import (
    ControlAdapter,
    ScaleWeaverConfig,
    condition_block,
    condition_inputs,
    encode,
    prefill,
)
from scaleweaver.reference import ReferenceBank, ReferenceInjector
from scaleweaver.schedule import ScaleStep
from scaleweaver.tokenizers.target import ResidualTarget

SCHEDULE = tiny_schedule()
TARGET = ResidualTarget(BITS, PATCH)
ON = (1.0,) * len(SCHEDULE)


def latents(count: int, seed: int = 0) -> Tensor:
    size = TARGET.final_grid(SCHEDULE)
    return torch.randn(count, BITS, *size, generator=torch.Generator().manual_seed(seed))


def control(backbone: Any, name: str = "canny", seed: int = 0, trained: bool = True, **config: Any) -> ControlAdapter:
    """A control on the backbone; `trained` gives every weight a random value, so that it has an effect."""
    adapter = add_control(backbone, ScaleWeaverConfig(kind=name, lora_rank=4, **config), name)
    generator = torch.Generator().manual_seed(seed)
    if trained:
        with torch.no_grad():
            for key, parameter in trainable_parameters(backbone, adapter, name).items():
                parameter.mul_(not key.startswith("lora.")).add_(
                    torch.randn(parameter.shape, generator=generator) * 0.3
                )
    return adapter


def logits(backbone: Any, *injectors: ReferenceInjector, rows: int = 2, seed: int = 1) -> Tensor:
    """Teacher-forced logits of all scales."""
    inputs, _, _ = TARGET.labels(latents(rows, seed), SCHEDULE)
    text = backbone.encode_text(tiny_text([5, 3, 4, 2][:rows]))
    return backbone(inputs, SCHEDULE.steps, text, KVCache(), injectors=injectors)


def injector(backbone: Any, adapter: ControlAdapter, name: str = "canny", seed: int = 7, **options: Any) -> Any:
    bank = encode(backbone, adapter, name, latents(1, seed), SCHEDULE, TARGET)
    return ReferenceInjector(bank, adapter, options.pop("strengths", ON), **options)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["before_gate", "after_gate"])
@pytest.mark.parametrize("scope", ["same", "causal"])
def test_fresh_adapter_reproduces_the_base_model(scope: str, position: str, dtype: torch.dtype) -> None:
    backbone = tiny_backbone().to(dtype)
    base = logits(backbone)
    adapter = control(backbone, trained=False, scope=scope, z_position=position)
    assert torch.equal(logits(backbone), base)
    assert torch.equal(logits(backbone, injector(backbone, adapter)), base)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["separate", "joint"])
def test_trained_adapter_changes_the_image_and_follows_its_control(fusion: str) -> None:
    backbone = tiny_backbone()
    base = logits(backbone)
    adapter = control(backbone, fusion=fusion)
    one, other = (logits(backbone, injector(backbone, adapter, seed=seed)) for seed in (7, 8))
    assert (one - base).abs().max() > 1e-2
    assert (one - other).abs().max() > 1e-3
    assert torch.equal(logits(backbone), base)  # the LoRA is off without its control


PLACEMENTS = {"first_half": (0,), "last_half": (1, 2), "every_other": (0, 2), "all": (0, 1, 2)}


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["separate", "joint"])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_placement(placement: Any, fusion: Any) -> None:
    backbone = tiny_backbone()
    base = logits(backbone)
    fresh = control(backbone, "fresh", trained=False, inject_blocks=placement, fusion=fusion)
    assert fresh.blocks == PLACEMENTS[placement]
    if fusion == "separate":
        assert torch.equal(logits(backbone, injector(backbone, fresh, "fresh")), base)
    adapter = control(backbone, inject_blocks=placement, fusion=fusion)
    reads = injector(backbone, adapter)
    assert tuple(reads.bank.values) == PLACEMENTS[placement]
    assert (logits(backbone, reads) - base).abs().max() > 1e-2
    # the condition stream runs through all blocks up to the last injected one, and its LoRA is in all of them
    last = PLACEMENTS[placement][-1]
    wrapped = {int(key.split(".")[2]) for key in trainable_parameters(backbone, adapter, "canny") if "lora_" in key}
    assert wrapped == set(range(last + 1))
    assert torch.equal(logits(backbone, injector(backbone, adapter, strengths=(0.0,) * 4)), base)


def test_placement_by_name_is_that_by_number() -> None:
    depths = {7: ((0, 1, 2), (3, 4, 5, 6), (0, 2, 4, 6)), 1: ((0,), (0,), (0,)), 4: ((0, 1), (2, 3), (0, 2))}
    for depth, blocks in depths.items():
        for name, expected in zip(("first_half", "last_half", "every_other"), blocks, strict=True):
            config = ScaleWeaverConfig(kind="canny", inject_blocks=name).resolve(depth)  # type: ignore[arg-type]
            assert config.inject_blocks == config.blocks == expected
    assert ScaleWeaverConfig(kind="canny").resolve(7) == ScaleWeaverConfig("canny", inject_blocks="first_half").resolve(
        7
    )
    with pytest.raises(ValueError, match="inject_blocks='middle': expected block numbers, None or one of 'first_half'"):
        ScaleWeaverConfig(kind="canny", inject_blocks="middle")  # type: ignore[arg-type]


@torch.no_grad()
def test_a_projection_that_does_not_start_at_zero() -> None:
    backbone = tiny_backbone()
    base = logits(backbone)
    torch.manual_seed(0)
    adapter = control(backbone, trained=False, z_init="normal")
    assert adapter.z["0"].weight.std().item() == pytest.approx(0.02, rel=0.2)  # type: ignore[union-attr]
    assert (logits(backbone, injector(backbone, adapter)) - base).abs().max() > 1e-4
    assert ScaleWeaverConfig.from_dict(adapter.config.to_dict()).z_init == "normal"
    old = {key: value for key, value in adapter.config.to_dict().items() if key != "z_init"}
    assert ScaleWeaverConfig.from_dict(old).z_init == "zero"
    with pytest.raises(ValueError, match="z_init='ones': expected one of 'zero', 'normal'"):
        ScaleWeaverConfig(kind="canny", z_init="ones")  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("placement", ["last_half", "every_other"])
def test_separate_and_joint_controls_add_up(placement: Any) -> None:
    backbone = tiny_backbone()
    separate = injector(backbone, control(backbone, "canny", seed=1, inject_blocks=placement), "canny")
    joint = injector(backbone, control(backbone, "depth", seed=2, fusion="joint", inject_blocks="all"), "depth", seed=8)
    both = logits(backbone, separate, joint)
    torch.testing.assert_close(both, logits(backbone, joint, separate), atol=1e-5, rtol=0)
    assert all((both - logits(backbone, one)).abs().max() > 1e-3 for one in (separate, joint))


@torch.no_grad()
def test_condition_does_not_depend_on_image_or_prompt() -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, scope="causal")
    reads = injector(backbone, adapter)
    before = {layer: (reads.bank.keys[layer].clone(), v.clone()) for layer, v in reads.bank.values.items()}
    assert not torch.equal(logits(backbone, reads, seed=1), logits(backbone, reads, seed=2))
    again = encode(backbone, adapter, "canny", latents(1, 7), SCHEDULE, TARGET)
    for layer, (k, v) in before.items():
        assert torch.equal(reads.bank.keys[layer], k) and torch.equal(reads.bank.values[layer], v)
        assert torch.equal(again.keys[layer], k) and torch.equal(again.values[layer], v)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["same", "causal"])
def test_one_pass_over_all_scales_equals_scale_by_scale(scope: str) -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, scope=scope, inject_blocks=(0, 2))
    bank = encode(backbone, adapter, "canny", latents(2, 7), SCHEDULE, TARGET)
    assert sorted(bank.keys) == [0, 2]
    if scope == "causal":  # a shorter schedule knows nothing of the later scales
        for scales in range(1, len(SCHEDULE)):
            part = SCHEDULE.truncate(scales)
            short = encode(backbone, adapter, "canny", latents(2, 7), part, TARGET)
            for layer, v in short.values.items():
                torch.testing.assert_close(v, bank.values[layer][:, :, : part.length], atol=1e-5, rtol=0)
    inputs = condition_inputs(latents(2, 7), SCHEDULE, TARGET)
    for step in SCHEDULE.steps:  # which tokens change when the condition changes at one scale alone
        changed = inputs.clone()
        changed[:, step.start : step.stop] += 1
        moved = prefill(backbone, adapter, "canny", changed, SCHEDULE).values[2] - bank.values[2]
        touched = moved.abs().amax((0, 1, 3)) > 1e-6  # (T,)
        last = SCHEDULE.length if scope == "causal" else step.stop
        assert touched[step.start : last].all()
        assert not touched[: step.start].any() and not touched[last:].any()
    if scope == "same":  # so a scale may as well be computed on its own
        for step in SCHEDULE.steps:
            alone = _one_scale(backbone, adapter, inputs, step)
            torch.testing.assert_close(alone, bank.values[2][:, :, step.start : step.stop], atol=1e-5, rtol=0)


def _one_scale(backbone: Any, adapter: ControlAdapter, inputs: Tensor, step: ScaleStep) -> Tensor:
    """Values of block 2 for the condition tokens of one scale, (B, H, n, D), without any mask."""
    c = inputs[:, step.start : step.stop] * adapter.input_scale + adapter.input_shift
    c = backbone.code_embed(c) + backbone.level_embed.weight[step.index] + adapter.type_embed
    null = backbone.encode_text(backbone.null_features((adapter.config.null_tokens,)))
    for layer in range(3):
        block, rope = backbone.blocks[layer], backbone.rope((step,))
        c, _, v = condition_block(block, "canny", c, null.modulation, rope, None, last=layer == 2)
    return v


@torch.no_grad()
@pytest.mark.parametrize("scope", ["same", "causal"])
@pytest.mark.parametrize("fusion", ["separate", "joint"])
def test_training_pass_equals_cached_generation(fusion: str, scope: str) -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, fusion=fusion, scope=scope)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :20] = 1
    reads = injector(backbone, adapter, strengths=(0.0, 0.5, 1.0, 2.0), mask=mask)
    expected = logits(backbone, reads)
    inputs, _, _ = TARGET.labels(latents(2, 1), SCHEDULE)
    text, cache = backbone.encode_text(tiny_text([5, 3])), KVCache()
    for step in SCHEDULE.steps:
        given = inputs[:, step.start - 1 : step.stop - 1] if step.index else None
        got = backbone(given, (step,), text, cache, injectors=(reads,))
        torch.testing.assert_close(got, expected[:, step.start : step.stop], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["separate", "joint"])
def test_strength_zero_is_the_base_model(fusion: str) -> None:
    backbone = tiny_backbone()
    base = logits(backbone)
    adapter = control(backbone, fusion=fusion)
    assert torch.equal(logits(backbone, injector(backbone, adapter, strengths=(0.0,) * 4)), base)
    late = logits(backbone, injector(backbone, adapter, strengths=(0.0, 0.0, 0.0, 1.0)))
    start = SCHEDULE.steps[3].start
    torch.testing.assert_close(late[:, :start], base[:, :start], atol=1e-5, rtol=0)
    assert (late[:, start:] - base[:, start:]).abs().max() > 1e-3


def test_lora_learns_once_z_has_moved_and_the_backbone_never() -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, trained=False)
    weights = trainable_parameters(backbone, adapter, "canny")
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)

    def gradients() -> dict[str, float]:
        optimizer.zero_grad()
        logits(backbone, injector(backbone, adapter)).square().mean().backward()
        assert all(weight.grad is not None for weight in weights.values())
        return {key: float(weight.grad.abs().max()) for key, weight in weights.items()}

    first = gradients()
    assert all((value > 0) == key.startswith("control.z.") for key, value in first.items())
    optimizer.step()
    second = gradients()
    # A waits for B, which starts at zero; of the last block only keys and values are used, and of these all are
    assert all(value > 0 for key, value in second.items() if "lora_A" not in key)
    optimizer.step()
    assert all(value > 0 for value in gradients().values())
    own = {id(weight) for weight in weights.values()}
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters() if id(p) not in own)


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        backbone = tiny_backbone()
        adapter = control(backbone, inject_blocks=(0, 1, 2))
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        logits(backbone, injector(backbone, adapter)).square().mean().backward()
        weights = trainable_parameters(backbone, adapter, "canny")
        grads.append({key: weight.grad for key, weight in weights.items()})
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads[0].values())
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["separate", "joint"])
def test_one_shared_row_equals_computing_every_row(fusion: str) -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, fusion=fusion)
    shared = encode(backbone, adapter, "canny", latents(1, 7), SCHEDULE, TARGET)
    each = encode(backbone, adapter, "canny", latents(1, 7).repeat(2, 1, 1, 1), SCHEDULE, TARGET)
    assert shared.rows == 1 and each.rows == 2
    branches = {"sees_control": (True, True), "images": 2}
    expected = logits(backbone, ReferenceInjector(shared, adapter, ON, **branches), rows=4)
    got = logits(backbone, ReferenceInjector(each, adapter, ON, **branches), rows=4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_modulation_gives_a_bank_per_row() -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, condition_modulation="text")
    text = backbone.encode_text(tiny_text([5, 3, 4, 2]))
    bank = encode(backbone, adapter, "canny", latents(2, 7), SCHEDULE, TARGET, text)
    assert bank.rows == 4
    # row 2 is image 0 in the second branch: same control, other text
    alone = encode(backbone, adapter, "canny", latents(1, 7), SCHEDULE, TARGET, text)
    assert alone.rows == 4 and not torch.equal(alone.values[0][0], alone.values[0][2])
    one = encode(backbone, adapter, "canny", latents(2, 7)[:1], SCHEDULE, TARGET, text.select_rows(torch.tensor([2])))
    torch.testing.assert_close(one.values[0][0], bank.values[0][2], atol=1e-5, rtol=0)
    logits(backbone, ReferenceInjector(bank, adapter, ON, (True, True), images=2), rows=4)
    with pytest.raises(ValueError, match="needs the prompt"):
        encode(backbone, adapter, "canny", latents(1), SCHEDULE, TARGET)
    with pytest.raises(ValueError, match="3 control images for 4 rows"):
        encode(backbone, adapter, "canny", latents(3), SCHEDULE, TARGET, text)


@pytest.mark.parametrize("fusion", ["separate", "joint"])
@torch.no_grad()
def test_two_controls_add_up_in_any_order(fusion: str) -> None:
    backbone = tiny_backbone()
    base = logits(backbone)
    canny = injector(backbone, control(backbone, "canny", seed=1, fusion=fusion), "canny")
    depth = injector(backbone, control(backbone, "depth", seed=2, fusion=fusion), "depth", seed=8)
    again = injector(backbone, canny.reader, "canny")
    assert all(torch.equal(again.bank.values[layer], v) for layer, v in canny.bank.values.items())
    both = logits(backbone, canny, depth)
    torch.testing.assert_close(both, logits(backbone, depth, canny), atol=1e-5, rtol=0)
    assert all((both - logits(backbone, one)).abs().max() > 1e-3 for one in (canny, depth))
    assert torch.equal(logits(backbone), base)


@torch.no_grad()
def test_blind_branch_and_dropped_rows() -> None:
    backbone = tiny_backbone()
    base = logits(backbone, rows=4)
    for fusion in ("separate", "joint"):
        adapter = control(backbone, fusion, fusion=fusion)
        bank = encode(backbone, adapter, fusion, latents(2, 7), SCHEDULE, TARGET)
        reads = ReferenceInjector(bank, adapter, ON, (True, False), images=2)
        out = logits(backbone, reads, rows=4)
        torch.testing.assert_close(out[2:], base[2:], atol=1e-5, rtol=0)
        assert all((out[row] - base[row]).abs().max() > 1e-3 for row in (0, 1))
        chosen = torch.tensor([1])
        text = backbone.encode_text(tiny_text([5, 3, 4, 2])).select_rows(chosen)
        inputs = TARGET.labels(latents(4, 1), SCHEDULE)[0][chosen]
        kept = backbone(inputs, SCHEDULE.steps, text, KVCache(), injectors=(reads.select_rows(chosen),))
        torch.testing.assert_close(kept[0], out[1], atol=1e-4, rtol=0)


def test_condition_inputs() -> None:
    latent = latents(2)
    finest = SCHEDULE.steps[-1]
    packed = TARGET.pack(latent.permute(0, 2, 3, 1))  # (B, n, N)
    continuous = condition_inputs(latent, SCHEDULE, TARGET)
    assert continuous.shape == (2, SCHEDULE.length, BITS * PATCH**2)
    torch.testing.assert_close(continuous[:, finest.start :], packed)
    means = latent.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))  # the 1x1 scale has 2x2 tokenizer positions
    torch.testing.assert_close(continuous[:, :1], TARGET.pack(means.permute(0, 2, 3, 1)))
    quantised = condition_inputs(latent, SCHEDULE, TARGET, "quantised")
    inputs, _, total = TARGET.labels(latent, SCHEDULE)
    torch.testing.assert_close(quantised[:, finest.start :], TARGET.pack(total.permute(0, 2, 3, 1)))
    assert quantised[:, :1].abs().max() > 0 and quantised.shape[1] == inputs.shape[1] + 1
    with pytest.raises(ValueError, match="resize the picture"):
        condition_inputs(latent[..., 1:], SCHEDULE, TARGET)


@torch.no_grad()
def test_quantised_tokens_reach_the_bank() -> None:
    banks: list[ReferenceBank] = []
    for tokens in ("continuous", "quantised"):
        backbone = tiny_backbone()
        adapter = control(backbone, condition_tokens=tokens)
        banks.append(encode(backbone, adapter, "canny", latents(1, 7), SCHEDULE, TARGET))
    assert (banks[0].values[0] - banks[1].values[0]).abs().max() > 1e-2


def test_config_rejects_what_it_cannot_do() -> None:
    good = ScaleWeaverConfig(kind="canny", inject_blocks=[2, 0], thresholds=[100, 200], resolution=512)
    assert ScaleWeaverConfig.from_dict(good.to_dict()) == good
    assert good.resolve(3).inject_blocks == (0, 2)
    assert ScaleWeaverConfig(kind="canny").resolve(32).inject_blocks == tuple(range(16))
    for wrong in ({"fusion": "both"}, {"scope": "all"}, {"z_position": "gate"}, {"lora_rank": 0}, {"lora_targets": ()}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ScaleWeaverConfig(kind="canny", **wrong)
    for blocks in ((0, 3), (), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="inject_blocks"):
            ScaleWeaverConfig(kind="canny", inject_blocks=blocks).resolve(3)
    with pytest.raises(ValueError, match="unknown control settings"):
        ScaleWeaverConfig.from_dict({"kind": "canny", "mode": "joint"})


def test_encoding_needs_the_lora() -> None:
    backbone = tiny_backbone()
    adapter = control(backbone)
    with pytest.raises(ValueError, match=r"no adapter 'depth' \(it holds: canny\)"):
        encode(backbone, adapter, "depth", latents(1), SCHEDULE, TARGET)


def test_mixed_precision_training() -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, trained=False)
    weights = trainable_parameters(backbone, adapter, "canny")
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():  # with gradients torch may choose another attention kernel
            assert torch.equal(logits(backbone, injector(backbone, adapter)), logits(backbone))
        out = logits(backbone, injector(backbone, adapter))
    out.square().mean().backward()
    grads = [weights[f"control.z.{block}.weight"].grad for block in adapter.blocks]
    assert all(grad is not None and grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in grads)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["separate", "joint"])
@pytest.mark.parametrize("scope", ["same", "causal"])
def test_locality_is_the_same_scale_by_scale(scope: str, fusion: str) -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, scope=scope, fusion=fusion, locality=0.5)
    reads = injector(backbone, adapter)
    together = logits(backbone, reads)
    inputs, _, _ = TARGET.labels(latents(2, 1), SCHEDULE)
    text, cache, first = backbone.encode_text(tiny_text([5, 3])), KVCache(), SCHEDULE.steps[0].n
    for step in SCHEDULE.steps:
        own = inputs[:, step.start - first : step.stop - first] if step.index else None
        alone = backbone(own, [step], text, cache, injectors=(reads,))
        torch.testing.assert_close(alone, together[:, step.start : step.stop], atol=1e-4, rtol=0)
    adapter.log_locality = None  # by content alone
    assert (logits(backbone, reads) - together).abs().max() > 1e-3


@torch.no_grad()
def test_great_locality_reads_the_token_at_the_same_place() -> None:
    backbone = tiny_backbone()
    adapter = control(backbone, locality=1e4)
    reads = injector(backbone, adapter)
    values = reads.bank.values[0].expand(2, -1, -1, -1)  # (R, H, T, D)
    q = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    found = reads.inject(0, SCHEDULE.steps, q, torch.zeros_like(values), None).before_gate
    assert found is not None
    torch.testing.assert_close(found, adapter.project(0, values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("locality", [0.0, -1.0, float("inf"), float("nan")])
def test_locality_must_be_positive(locality: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number, or None"):
        ScaleWeaverConfig(kind="canny", locality=locality)
