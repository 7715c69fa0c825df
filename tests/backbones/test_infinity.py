"""The Infinity backbone against recorded numbers of the published code, and what it promises beyond them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import Recording, log_odds, recording, tiny_backbone, tiny_schedule, tiny_text
from torch.testing import assert_close

from scaleweaver.backbones.infinity import PRESETS, InfinityTransformer
from scaleweaver.backbones.layers import modulate
from scaleweaver.backbones.rope import rope_table
from scaleweaver.cache import KVCache, NoCache
from scaleweaver.contracts import Injection, TextFeatures
from scaleweaver.convert.keymap import chunk_size, infinity_key
from scaleweaver.kernels.qkv_rope import rotate
from scaleweaver.schedule import ScaleSchedule, infinity_schedule
from scaleweaver.train.losses import bit_loss

MODELS = ["infinity_tiny", "infinity_tiny_8b"]


@pytest.fixture(scope="module", params=MODELS)
def recorded(request) -> Recording:
    return recording(request.param)


def schedule_of(recorded: Recording, tag: str) -> ScaleSchedule:
    schedule = infinity_schedule(str(recorded.cases[tag]["h_div_w"]), recorded.cases[tag]["pn"])
    assert [[1, h, w] for h, w in schedule.grids] == recorded.tensors[f"{tag}.schedule"].tolist()
    return schedule


def labels_of(recorded: Recording, tag: str) -> torch.Tensor:
    return torch.cat([recorded.tensors[f"{tag}.labels.{k}"] for k in range(7)], dim=1)


def tiny_inputs(model: InfinityTransformer, rows: int = 2) -> torch.Tensor:
    tokens = tiny_schedule().length - 1
    return torch.randn(rows, tokens, model.config.bits, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    assert_close(ours, theirs, atol=atol, rtol=0)


# published numbers


@torch.no_grad()
def test_text_path_equals_the_recording(recorded):
    model, text, want = recorded.backbone(), recorded.text(), recorded.tensors
    context = model.encode_text(text)
    normed = model._normed_text(text.features)
    close(normed, want["text.normed"], 1e-5)
    close(model.text_proj(normed), want["text.ca_kv"], 1e-5)
    close(context.pooled, want["text.sos"], 1e-5)
    close(context.modulation, want["text.gss"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tag", ["sq", "ns"])
def test_logits_and_losses_equal_the_recording(recorded, tag):
    model, want, schedule = recorded.backbone(), recorded.tensors, schedule_of(recorded, tag)
    logits = model(want[f"{tag}.x_in"], schedule.steps, model.encode_text(recorded.text()), KVCache())
    close(logits, log_odds(want[f"{tag}.tf.logits"]), 2e-4)
    labels = labels_of(recorded, tag)
    loss, per_scale, accuracy = bit_loss(logits, labels, schedule)
    close(loss[None], want[f"{tag}.tf.loss_reweighted"], 1e-5)
    close(per_scale, want[f"{tag}.tf.loss_per_scale"], 1e-5)
    close(bit_loss(logits, labels, schedule, reweight=False)[0][None], want[f"{tag}.tf.loss_mean"], 1e-5)
    share = sum(float(right) * step.n for right, step in zip(accuracy, schedule, strict=True)) / schedule.length
    assert share == pytest.approx(float(want[f"{tag}.tf.bit_accuracy"]), abs=1e-6)


@torch.no_grad()
def test_unconditional_logits_equal_the_recording(recorded):
    model, want, schedule = recorded.backbone(), recorded.tensors, schedule_of(recorded, "sq")
    null = model.encode_text(model.null_features(recorded.text().lengths))
    close(model(want["sq.x_in"], schedule.steps, null, KVCache()), log_odds(want["sq.tf_uncond.logits"]), 2e-4)


@torch.no_grad()
def test_hidden_states_equal_the_recording():
    recorded = recording("infinity_tiny")
    model, want, steps = recorded.backbone(), recorded.tensors, schedule_of(recorded, "sq").steps[:5]
    first = TextFeatures(recorded.text().features[: recorded.text().lengths[0]], recorded.text().lengths[:1])
    context = model.encode_text(first)
    inputs = want["sq.x_in"][:1, : steps[-1].stop - 1]
    close(model.embed(inputs, steps, context), want["sq.tf.block0_input"], 1e-5)
    seen: list[torch.Tensor] = []

    def watch(layer: int, x: torch.Tensor) -> torch.Tensor:
        assert layer == len(seen)
        seen.append(x)
        return x

    model(inputs, steps, context, KVCache(NoCache()), mix=watch)
    assert len(seen) == model.config.depth
    for layer, x in enumerate(seen):
        close(x, want[f"sq.tf.block_out.{layer}"], 1e-4)


def test_gradients_equal_the_recording(recorded):
    model, want, schedule = recorded.backbone(), recorded.tensors, schedule_of(recorded, "sq")
    logits = model(want["sq.x_in"], schedule.steps, model.encode_text(recorded.text()), KVCache())
    bit_loss(logits, labels_of(recorded, "sq"), schedule)[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    blocks = chunk_size(name.removeprefix("weights.") for name in want)
    for name, norm in zip(recorded.cases["sq"]["grad_norm_keys"], want["sq.tf.grad_norms"].tolist(), strict=True):
        gradient = gradients[infinity_key(name, blocks)]
        assert (0.0 if gradient is None else gradient.norm().item()) == pytest.approx(norm, rel=1e-3), name
    prefix = "sq.tf.grad."
    recorded_fully = [name for name in want if name.startswith(prefix)]
    assert len(recorded_fully) == 10
    for name in recorded_fully:
        gradient = gradients[infinity_key(name.removeprefix(prefix), blocks)]
        error = (gradient - want[name].reshape(gradient.shape)).norm() / want[name].norm()
        assert error < 1e-3, name


@torch.inference_mode()
@pytest.mark.parametrize("tag", ["sq", "ns"])
def test_scale_by_scale_equals_all_at_once(recorded, tag):
    model, inputs, schedule = recorded.backbone(), recorded.tensors[f"{tag}.x_in"], schedule_of(recorded, tag)
    context, cache = model.encode_text(recorded.text()), KVCache()
    parts = []
    for step in schedule:
        given = inputs[:, step.start - 1 : step.stop - 1] if step.index else None
        parts.append(model(given, (step,), context, cache))
    close(torch.cat(parts, dim=1), log_odds(recorded.tensors[f"{tag}.tf.logits"]), 2e-4)
    assert cache.tokens(0) == schedule.length - schedule.steps[-1].n


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("ratio", ["1.0", "1.5"])
def test_rope_tables_equal_the_recording(mode, ratio):
    want = recording("infinity_rope").tensors[f"mode{mode}.dim16.h{ratio}.first5scales"]
    cos, sin = rope_table(infinity_schedule(ratio, "0.06M").steps[:5], head_width=16, mode=mode)
    close(torch.stack((cos, sin)), want, 1e-6)


def test_rotation_equals_the_recording():
    want = recording("infinity_rope").tensors
    rope = rope_table(infinity_schedule("1.0", "1M").steps[3:4], head_width=128)
    for name in "qk":
        given, turned = want[f"apply.scale_ind3.{name}_in"], want[f"apply.scale_ind3.{name}_out"]
        close(rotate(given.transpose(1, 2), rope).transpose(1, 2), turned, 1e-5)


def test_published_sizes():
    counts = {"125M": 125_148_800, "2B": 2_204_564_032, "8B": 8_375_791_824}
    for name in PRESETS:
        with torch.device("meta"):
            model = InfinityTransformer(**{**PRESETS[name], "depth": 1})
        total = sum(p.numel() for p in model.parameters())
        block = sum(p.numel() for p in model.blocks.parameters())
        if name in counts:
            assert total + (PRESETS[name]["depth"] - 1) * block == counts[name]
        if name == "layer32":  # 32.5 multiples of 256 round to the even 32
            assert model.blocks[0].ffn.fc1.out_features == 8192


# what holds beyond them


def test_the_attention_scale_stops_at_a_hundred():
    model = tiny_backbone()
    context, inputs, steps = model.encode_text(tiny_text()), tiny_inputs(model), tiny_schedule().steps
    with torch.no_grad():
        logits = []
        for value in (4.7, 9.0, 3.0):
            for block in model.blocks:
                block.attn.log_scale.fill_(value)
            logits.append(model(inputs, steps, context, KVCache()))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@torch.no_grad()
def test_prompts_of_a_batch_do_not_meet():
    model, steps = tiny_backbone(), tiny_schedule().steps
    inputs, text = tiny_inputs(model, 3), tiny_text((5, 1, 9))
    together = model(inputs, steps, model.encode_text(text), KVCache())
    start = 0
    for row, n in enumerate(text.lengths):
        one = model.encode_text(TextFeatures(text.features[start : start + n], (n,)))
        assert one.mask is None
        close(model(inputs[row : row + 1], steps, one, KVCache()), together[row : row + 1], 1e-5)
        start += n
    context = model.encode_text(text).select_rows(torch.tensor([2, 0]))
    close(model(inputs[[2, 0]], steps, context, KVCache()), together[[2, 0]], 1e-5)


@torch.no_grad()
def test_layers_can_be_left_out_and_mixed():
    model, steps = tiny_backbone(), tiny_schedule().steps
    inputs, context = tiny_inputs(model), model.encode_text(tiny_text())
    full = model(inputs, steps, context, KVCache())
    assert torch.equal(model(inputs, steps, context, KVCache(), layers=(0, 1, 2)), full)
    shorter = copy.deepcopy(model)
    del shorter.blocks[1]
    context_shorter = copy.copy(context)
    context_shorter.keys, context_shorter.values = context.keys[::2], context.values[::2]
    left_out = model(inputs, steps, context, KVCache(), layers=(0, 2))
    close(left_out, shorter(inputs, steps, context_shorter, KVCache()), 1e-6)
    mixed = model(inputs, steps, context, KVCache(), mix=lambda layer, x: x * 0.5 if layer == 0 else x)
    assert not torch.allclose(mixed, full)


class Recorder:
    """Injects given terms and remembers what it was shown."""

    def __init__(self, model: InfinityTransformer, inside: float, outside: float, lse: bool) -> None:
        self.width, self.inside, self.outside, self.lse = model.config.width, inside, outside, lse
        self.shown: list[tuple[torch.Size, torch.Size | None]] = []

    def needs_lse(self, layer: int) -> bool:
        return self.lse

    def keys(self, layer, steps, q):
        return None

    def inject(self, layer, steps, q, attended, lse, read=None):
        assert read is None
        self.shown.append((attended.shape, None if lse is None else lse.shape))
        rows, tokens = attended.shape[0], attended.shape[2]
        term = torch.ones(rows, tokens, self.width)
        return Injection(attended, term * self.inside, term * self.outside)

    def select_rows(self, rows):
        return self


@torch.no_grad()
def test_injected_terms_enter_inside_and_outside_the_gate():
    model, steps = tiny_backbone(depth=1), tiny_schedule().steps
    inputs, context = tiny_inputs(model), model.encode_text(tiny_text())
    plain = model(inputs, steps, context, KVCache())
    heads, length = model.config.heads, tiny_schedule().length
    for inside, outside, lse in ((0.0, 0.0, False), (0.0, 0.0, True), (0.7, 0.0, False), (0.0, 0.7, True)):
        injectors = [Recorder(model, inside, outside, lse), Recorder(model, 0.0, outside, False)]
        got = model(inputs, steps, context, KVCache(), injectors=injectors)
        block, rope = model.blocks[0], model.rope(steps)
        gamma, _, scale, _, shift, _ = block.gates(context.modulation)
        x = model.embed(inputs, steps, context)
        q, k, v = block.attn.project(modulate(x, scale, shift), rope)
        attended, _ = KVCache().attend(0, steps, q, k, v)
        x = x + gamma * (block.attn.output(attended) + inside) + 2 * outside
        x = x + block.cross(block.cross_norm(x), context.keys[0], context.values[0], context.mask)
        _, gamma, _, scale, _, shift = block.gates(context.modulation)
        x = x + gamma * block.ffn(modulate(x, scale, shift))
        close(got, model.head_logits(x, context), 1e-5)
        close(got, plain, 1e-5) if inside == outside == 0 else None
        assert injectors[0].shown == [((2, heads, length, 16), (2, heads, length) if lse else None)]


def test_gradient_checkpointing_changes_nothing():
    model, schedule = tiny_backbone(), tiny_schedule()
    labels = torch.randint(0, 2, (2, schedule.length, model.config.bits))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(tiny_inputs(model), schedule.steps, model.encode_text(tiny_text()), KVCache())
        bit_loss(logits, labels, schedule)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing
    for ours, theirs in zip(gradients(), plain, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        model(None, schedule.steps[:1], model.encode_text(tiny_text()), KVCache())


def test_training_under_bfloat16_autocast_follows_float32():
    model, schedule = tiny_backbone(), tiny_schedule()
    labels = torch.randint(0, 2, (2, schedule.length, model.config.bits), generator=torch.Generator().manual_seed(2))
    gradients = []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tiny_inputs(model), schedule.steps, model.encode_text(tiny_text()), KVCache())
        assert logits.dtype == torch.float32
        bit_loss(logits, labels, schedule)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_bfloat16_weights_follow_float32():
    model, steps = tiny_backbone(), tiny_schedule().steps
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        exact = model(tiny_inputs(model), steps, model.encode_text(tiny_text()), KVCache())
        rough = half(tiny_inputs(model), steps, half.encode_text(tiny_text()), KVCache())
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.05


def test_save_and_load_round_trip(tmp_path):
    model, steps = tiny_backbone(rope_mode=0, pool_heads=2), tiny_schedule().steps
    model.save_pretrained(tmp_path)
    loaded = InfinityTransformer.from_pretrained(tmp_path)
    assert loaded.config.rope_mode == 0 and loaded.config.pool_heads == 2 and not loaded.training
    with torch.no_grad():
        a, b = (m(tiny_inputs(m), steps, m.encode_text(tiny_text()), KVCache()) for m in (model, loaded))
    assert torch.equal(a, b)
    half = InfinityTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.head.weight.dtype == half.blocks[0].attn.log_scale.dtype == torch.float32
    with torch.no_grad():
        rough = half(tiny_inputs(half), steps, half.encode_text(tiny_text()), KVCache())
    assert (rough - a).norm() / a.norm() < 0.05


def test_the_head_is_the_difference_of_its_classes_also_with_a_lora():
    from peft import LoraConfig

    model, steps = tiny_backbone(), tiny_schedule().steps
    context = model.encode_text(tiny_text())
    x = torch.randn(2, steps[-1].stop, model.config.width, generator=torch.Generator().manual_seed(1))
    scale, shift = model.head_modulation(torch.nn.functional.silu(context.pooled))[:, None].chunk(2, dim=-1)
    classes = model.head(modulate(x, scale, shift))
    logits = model.head_logits(x, context)
    assert logits.shape == (2, steps[-1].stop, model.config.bits) and logits.dtype == torch.float32
    close(logits, log_odds(classes), 1e-5)
    model.add_adapter(LoraConfig(r=2, target_modules=["head"]), adapter_name="style")
    close(model.head_logits(x, context), logits, 1e-5)
    model.head.lora_B["style"].weight.data.normal_(generator=torch.Generator().manual_seed(2))
    styled = model.head_logits(x, context)
    assert (styled - logits).abs().max() > 1e-2
    styled.sum().backward()
    assert model.head.lora_A["style"].weight.grad.abs().max() > 0


def test_peft_wraps_the_projections():
    from peft import LoraConfig

    model, steps = tiny_backbone(), tiny_schedule().steps
    inputs, text = tiny_inputs(model), tiny_text()
    before = model(inputs, steps, model.encode_text(text), KVCache())
    targets = r"blocks\.\d+\.(attn\.(qkv|proj)|ffn\.(fc1|fc2))"
    model.add_adapter(LoraConfig(r=2, target_modules=targets), adapter_name="edges")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4 * model.config.depth
    logits = model(inputs, steps, model.encode_text(text), KVCache())
    assert torch.equal(logits, before)  # a fresh adapter adds nothing
    logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    half = model.to(torch.bfloat16)
    assert half(inputs, steps, half.encode_text(text), KVCache()).isfinite().all()


def test_stochastic_depth_closes_whole_branches():
    model, steps = tiny_backbone(drop_path=1.0, depth=2), tiny_schedule().steps
    inputs, context = tiny_inputs(model), model.encode_text(tiny_text())
    assert [block.drop_path for block in model.blocks] == [0.0, 1.0]
    kept = torch.cat([torch.where(model.train().blocks[1]._drop(torch.ones(1, 1, 1)) > 0, 1.0, 0.0) for _ in range(8)])
    assert not kept.any()
    model.blocks[1].drop_path = 0.25
    torch.manual_seed(0)
    gates = model.blocks[1]._drop(torch.ones(4000, 1, 1))
    assert gates.mean() == pytest.approx(1.0, abs=0.05) and gates.max() == pytest.approx(4 / 3)
    torch.manual_seed(0)
    noisy = model(inputs, steps, context, KVCache())
    assert torch.equal(model.eval()(inputs, steps, context, KVCache()), model(inputs, steps, context, KVCache()))
    assert noisy.shape == (2, 30, 12)


def test_tables_made_while_generating_can_be_trained_with():
    model = tiny_backbone()
    schedule = ScaleSchedule(((1, 1), (2, 3), (4, 5)), position_grid=(4, 5), stride=8)
    inputs = torch.randn(2, schedule.length - 1, model.config.bits)
    with torch.inference_mode():
        model(inputs, schedule.steps, model.encode_text(tiny_text()), KVCache())
    model(inputs, schedule.steps, model.encode_text(tiny_text()), KVCache()).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None


def test_a_first_scale_of_several_tokens_and_a_single_scale():
    model = tiny_backbone()
    context = model.encode_text(tiny_text((4, 4)))
    wide = ScaleSchedule(((2, 2), (4, 4)), position_grid=(4, 4))
    assert model(torch.randn(2, 16, 12), wide.steps, context, KVCache()).shape == (2, 20, 12)
    alone = ScaleSchedule(((1, 1),), position_grid=(1, 1))
    assert model(None, alone.steps, context, KVCache()).shape == (2, 1, 12)


def test_wrong_inputs_are_named():
    model, steps = tiny_backbone(), tiny_schedule().steps
    context = model.encode_text(tiny_text())
    with pytest.raises(ValueError, match="rows of the text"):
        model(torch.randn(1, 29, 12), steps, context, KVCache())
    with pytest.raises(ValueError, match="at most 15 scales"):
        many = ScaleSchedule(((1, 1),) * 16, position_grid=(1, 1))
        model(torch.randn(2, 15, 12), many.steps, context, KVCache())
    with pytest.raises(ValueError, match="end token"):
        model.encode_text(TextFeatures(torch.randn(3, 16), (3, 0)))
    with pytest.raises(ValueError, match=r"\(8, 16\)"):
        model.encode_text(TextFeatures(torch.randn(8, 17), (5, 3)))
    with pytest.raises(ValueError, match="shorten the prompt"):
        model.null_features((25,))
    with pytest.raises(ValueError, match="multiple"):
        tiny_backbone(heads=3)
    with pytest.raises(ValueError, match="rope_mode"):
        tiny_backbone(rope_mode=3)
    with pytest.raises(ValueError, match="125M"):
        InfinityTransformer.preset("3B")


def test_fresh_weights_start_near_even_odds():
    torch.manual_seed(0)
    model = InfinityTransformer(depth=2, width=32, heads=2, bits=12, text_width=16, text_length=8)
    with torch.no_grad():
        logits = model(tiny_inputs(model), tiny_schedule().steps, model.encode_text(tiny_text()), KVCache())
    assert 0 < logits.abs().max() < 0.2
    assert model.blocks[0].modulation[:, :, :2].abs().max() < 1e-4 < model.blocks[0].modulation.abs().max()


@torch.no_grad()
def test_fused_gelu_is_gelu_and_an_idle_lora_changes_no_bit():
    from peft import LoraConfig

    model, steps = tiny_backbone(), tiny_schedule().steps
    inputs, context = tiny_inputs(model), model.encode_text(tiny_text())
    fused = model(inputs, steps, context, KVCache())
    with torch.backends.mkldnn.flags(enabled=False):
        close(fused, model(inputs, steps, context, KVCache()), 1e-4)
    model.add_adapter(LoraConfig(r=2, target_modules=r"blocks\.\d+\.ffn\.fc1"), adapter_name="style")
    model.disable_adapters()
    for block in model.blocks:
        block.ffn.fc1._active_adapter = []
    assert torch.equal(model(inputs, steps, context, KVCache()), fused)
