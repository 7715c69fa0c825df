"""The whole engine against recorded numbers of the published code, and what the loop promises beyond them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import log_odds, recording

from scaleweaver.cache import KVCache
from scaleweaver.conditions import build, make_generators
from scaleweaver.contracts import TextFeatures
from scaleweaver.guidance import ClassifierFreeGuidance
from scaleweaver.loop import SingleModel, generate
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import infinity_schedule
from scaleweaver.tokenizers.target import ResidualTarget


class Recorded:
    """One small published-style model, its prompts and its recorded runs."""

    def __init__(self, name: str) -> None:
        model = recording(name)
        self.backbone, self.text = model.backbone(), model.text()
        self.target = ResidualTarget(model.config["codebook_dim"], 2 if model.config["apply_spatial_patchify"] else 1)
        with safe_open(Path(__file__).parent / "golden" / "infinity_loop_small.safetensors", "pt") as file:
            self.cases = json.loads(file.metadata()[name])
            self.torch = file.metadata()["torch"]
            names = [key for key in file.keys() if key.startswith(name + ".")]  # noqa: SIM118
            self.runs = {key[len(name) + 1 :]: file.get_tensor(key) for key in names}
        self.negative = TextFeatures(self.runs["inputs.negative.features"], tuple(model.config["negative_lens"]))

    def schedule(self, tag: str):
        ratio = self.cases[tag]["h_div_w"]
        return infinity_schedule(f"{ratio:g}" if ratio != 1 else "1.0")

    def bits(self, name: str) -> list[torch.Tensor]:
        """Recorded bits per scale, in transformer layout."""
        return [self.target.pack(self.runs[f"{name}.{k}"][:, 0]) for k in range(7)]

    def run(self, tag: str, *, negative=False, insert_after=None, forced=None):
        case, schedule = self.cases[tag], self.schedule(tag)
        seen: list[torch.Tensor] = []

        class Watched(BitwiseSampler):
            def sample(self, logits, step, generators):
                seen.append(self.tempered(logits, step))
                return super().sample(logits, step, generators)

        conditions = build(
            self.backbone, self.text, generators=make_generators(0, 2), negative=self.negative if negative else None
        )
        out = generate(
            conditions,
            schedule,
            router=SingleModel(self.backbone),
            target=self.target,
            guidance=ClassifierFreeGuidance(case["cfg_list"], len(schedule), insert_after=insert_after),
            sampler=Watched(case["tau_list"], top_k=1),
            forced=forced,
        )
        return out, seen


@pytest.fixture(scope="module", params=["infinity_tiny", "infinity_tiny_8b"])
def recorded(request) -> Recorded:
    return Recorded(request.param)


def assert_logits(recorded: Recorded, name: str, seen: list[torch.Tensor]) -> None:
    for k, logits in enumerate(seen):
        torch.testing.assert_close(logits, log_odds(recorded.runs[f"{name}.logits.{k}"]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("tag", ["sq", "ns"])
def test_guided_generation_equals_the_recording(recorded, tag):
    out, seen = recorded.run(tag)
    for ours, theirs in zip(out.codes, recorded.bits(f"{tag}.ar_argmax.bits"), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(out.latent, recorded.runs[f"{tag}.ar_argmax.latent"], atol=1e-5, rtol=0)
    if tag == "sq":
        assert_logits(recorded, "sq.ar_argmax", seen)


def test_forced_codes_equal_the_recording(recorded):
    forced = recorded.bits("sq.gt_bits")
    out, seen = recorded.run("sq", forced=forced)
    assert_logits(recorded, "sq.ar_forced", seen)
    torch.testing.assert_close(out.latent, recorded.runs["sq.ar_forced.latent"], atol=1e-5, rtol=0)
    assert all(torch.equal(ours, given) for ours, given in zip(out.codes, forced, strict=True))


def test_guidance_inside_the_network_equals_the_recording(recorded):
    layer = recorded.backbone.config.depth + recorded.cases["sq"]["layer_insertion"]
    _, seen = recorded.run("sq", forced=recorded.bits("sq.gt_bits"), insert_after=layer)
    assert_logits(recorded, "sq.ar_forced_layercfg", seen)


def test_negative_prompts_equal_the_recording(recorded):
    _, seen = recorded.run("sq", forced=recorded.bits("sq.gt_bits"), negative=True)
    assert_logits(recorded, "sq.ar_forced_negative", seen)


def test_random_stream_equals_the_recording(recorded):
    case, schedule = recorded.cases["sq"]["sampled"], recorded.schedule("sq")
    shared = torch.Generator().manual_seed(case["g_seed"])  # the recording draws image after image from one stream
    out = generate(
        build(recorded.backbone, recorded.text, generators=[shared, shared]),
        schedule,
        router=SingleModel(recorded.backbone),
        target=recorded.target,
        guidance=ClassifierFreeGuidance(case["cfg"], len(schedule)),
        sampler=BitwiseSampler(case["tau"], top_k=case["top_k"], top_p=case["top_p"]),
    )
    same = [torch.equal(a, b) for a, b in zip(out.codes, recorded.bits("sq.ar_sampled.bits"), strict=True)]
    # another build of torch may order its random numbers otherwise
    assert all(same) or torch.__version__.partition("+")[0] != recorded.torch.partition("+")[0]


def run(recorded: Recorded, *, text=None, scale=3.0, seeds=(5, 6), sampler=None, **options):
    """A sampled run of the square schedule."""
    schedule = options.pop("schedule", infinity_schedule())
    guidance = ClassifierFreeGuidance(scale, len(schedule))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generate(
        build(recorded.backbone, text or recorded.text, generators=generators, branches=guidance.branches),
        schedule,
        router=SingleModel(recorded.backbone),
        target=recorded.target,
        guidance=guidance,
        sampler=sampler or BitwiseSampler(0.7),
        **options,
    )


def prompt(text: TextFeatures, *rows: int) -> TextFeatures:
    parts = text.features.split(text.lengths)
    return TextFeatures(torch.cat([parts[row] for row in rows]), tuple(text.lengths[row] for row in rows))


def test_a_picture_does_not_depend_on_its_batch(recorded):
    batch = run(recorded, text=prompt(recorded.text, 0, 1, 0), seeds=(5, 6, 7))
    for row, (which, seed) in enumerate([(0, 5), (1, 6), (0, 7)]):
        alone = run(recorded, text=prompt(recorded.text, which), seeds=(seed,))
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone.codes, batch.codes, strict=True))
    assert not torch.equal(batch.codes[-1][0], batch.codes[-1][2])


def test_global_random_numbers_are_not_touched(recorded):
    before = torch.get_rng_state()
    run(recorded)
    assert torch.equal(torch.get_rng_state(), before)


def test_stop_after_gives_the_leading_scales_of_the_full_run(recorded):
    full, part = run(recorded), run(recorded, stop_after=3)
    assert len(part.codes) == 3 and part.latent.shape == full.latent.shape
    assert all(torch.equal(a, b) for a, b in zip(part.codes, full.codes, strict=False))
    latent = recorded.target.initial(2, infinity_schedule())
    for codes, step in zip(part.codes, infinity_schedule().steps, strict=False):
        latent = recorded.target.absorb(latent, codes, step)
    assert torch.equal(part.latent, latent)


def test_forcing_what_was_drawn_changes_nothing(recorded):
    full = run(recorded)
    again = run(recorded, forced=full.codes[:4])
    assert all(torch.equal(a, b) for a, b in zip(again.codes, full.codes, strict=True))
    flipped = run(recorded, forced=[1 - full.codes[0]])
    assert torch.equal(flipped.codes[0], 1 - full.codes[0])
    assert not torch.equal(flipped.codes[1], full.codes[1])


def test_every_scale_shows_a_complete_latent(recorded):
    previews = []
    out = run(recorded, on_scale=lambda step, state: previews.append((step.index, state.latent)))
    assert [index for index, _ in previews] == list(range(7))
    assert all(latent.shape == out.latent.shape and latent.dtype == torch.float32 for _, latent in previews)
    assert torch.equal(previews[-1][1], out.latent)
    assert not torch.equal(previews[-2][1], out.latent)


def kv_bytes(recorded: Recorded, tokens: int, rows: int, size: int) -> int:
    config = recorded.backbone.config
    return config.depth * config.width * tokens * rows * 2 * size  # keys and values


def test_the_cache_holds_the_history_before_the_last_scale_and_is_freed(recorded):
    sizes, caches = [], []

    def look(step, state):
        sizes.append(state.cache.nbytes())
        caches.append(state.cache)

    run(recorded, on_scale=look)
    history = infinity_schedule().steps[-1].start
    assert sizes[-1] == sizes[-2] == kv_bytes(recorded, history, rows=4, size=4)
    assert caches[-1].nbytes() == 0


def test_keys_are_kept_in_the_dtype_of_values():
    recorded = Recorded("infinity_tiny")
    recorded.backbone.to(torch.bfloat16)
    sizes = []
    out = run(recorded, on_scale=lambda step, state: sizes.append(state.cache.nbytes()))
    assert sizes[-1] == kv_bytes(recorded, infinity_schedule().steps[-1].start, rows=4, size=2)
    assert out.latent.dtype == torch.float32


def test_the_null_half_goes_when_its_weight_is_gone(recorded):
    rows, branches = [], []

    def look(step, state):
        rows.append(len(state.conditions.text.pooled))
        branches.append(state.conditions.branches)

    weights = [3.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0]
    dropped = run(recorded, scale=weights, on_scale=look)
    assert rows == [4, 4, 4, 4, 2, 2, 2] and branches == [2, 2, 2, 2, 1, 1, 1]
    kept = run(recorded, scale=[*weights[:-1], 1.0 + 1e-7])  # a last weight that keeps the half alive but does nothing
    assert all(torch.equal(a, b) for a, b in zip(dropped.codes, kept.codes, strict=True))


def test_guidance_one_is_no_guidance(recorded):
    plain = run(recorded, scale=1.0)
    spare = generate(  # conditions with a null half that nobody needs
        build(recorded.backbone, recorded.text, generators=[torch.Generator().manual_seed(seed) for seed in (5, 6)]),
        infinity_schedule(),
        router=SingleModel(recorded.backbone),
        target=recorded.target,
        guidance=ClassifierFreeGuidance(1.0, 7),
        sampler=BitwiseSampler(0.7),
    )
    assert torch.equal(plain.latent, spare.latent)
    assert not torch.equal(plain.latent, run(recorded, scale=2.0).latent)


def test_a_model_can_be_trained_after_it_generated():
    recorded = Recorded("infinity_tiny")
    run(recorded)
    schedule = infinity_schedule()
    latent = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs, _, _ = recorded.target.labels(latent, schedule)
    context = recorded.backbone.encode_text(prompt(recorded.text, 0))
    recorded.backbone(inputs, schedule.steps, context, KVCache()).square().mean().backward()
    assert recorded.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop_after": 0}, "stop_after is 0; pass a number of scales from 1 to 7"),
        ({"stop_after": 8}, "stop_after is 8"),
        ({"forced": [torch.zeros(1, 1, 8)]}, r"forced codes of scale 0 have shape \(1, 1, 8\); expected \(2, 1, N\)"),
        ({"forced": [torch.zeros(2, 1, 1, 8)]}, "transformer layout"),
        ({"forced": [torch.zeros(2, 1, 8)] * 8}, "forced holds 8 scales"),
        ({"scale": [1.0, 2.0]}, "guidance_scale has 2 values"),
    ],
)
def test_bad_requests(recorded, options, message):
    with pytest.raises(ValueError, match=message):
        run(recorded, **options)


def test_conditions_must_hold_all_branches(recorded):
    with pytest.raises(ValueError, match="1 branches but the guidance mixes 2; build them with branches=2"):
        generate(
            build(recorded.backbone, recorded.text, generators=make_generators(0, 2), branches=1),
            infinity_schedule(),
            router=SingleModel(recorded.backbone),
            target=recorded.target,
            guidance=ClassifierFreeGuidance(2.0, 7),
            sampler=BitwiseSampler(),
        )
