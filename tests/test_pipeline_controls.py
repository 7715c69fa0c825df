"""Controls of a call: what acts, where, when and how strongly, alone and together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import PROMPT, add_tiny_control, edges, latent, tiny_pipeline
from torch import Tensor

from scaleweaver.contracts import Control
from scaleweaver.control_images import EncodedControl
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import ScaleSchedule, ScaleStep


@pytest.fixture(scope="module")
def pipe() -> VARControlPipeline:
    return tiny_pipeline("canny", "depth")


def half() -> np.ndarray:
    """A mask that is white on the left."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    return mask


class Listener(BitwiseSampler):
    """Draws as usual and keeps the guided logits."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.heard: list[Tensor] = []

    def sample(self, logits: Tensor, step: ScaleStep, generators: Any) -> Tensor:
        self.heard.append(logits.clone())
        return super().sample(logits, step, generators)


def first_logits(pipe: VARControlPipeline, *controls: Control, **arguments: Any) -> Tensor:
    """Guided logits of the first scale, which no drawn code has touched yet."""
    listener = Listener()
    latent(pipe, control=list(controls) or None, sampler=listener, stop_after=1, **arguments)
    return listener.heard[0]


# alone


def test_controls_act(pipe: VARControlPipeline) -> None:
    plain = latent(pipe)
    canny = latent(pipe, control={"canny": edges()})
    assert not torch.equal(canny, plain)
    assert not torch.equal(canny, latent(pipe, control={"depth": edges()}))
    assert not torch.equal(canny, latent(pipe, control={"canny": edges(1)}))
    assert not torch.equal(canny, latent(pipe, control=Control("canny", edges(), scale=0.5)))


@pytest.mark.parametrize(
    "off", [{"scale": 0}, {"scale": [0, 0, 0, 0]}, {"start": 0.5, "end": 0.5}, {"mask": Image.new("L", (8, 8))}]
)
def test_a_control_switched_off_changes_nothing(pipe: VARControlPipeline, off: dict[str, Any]) -> None:
    assert torch.equal(latent(pipe, control=Control("canny", edges(), **off)), latent(pipe))


def test_ways_to_say_the_same(pipe: VARControlPipeline, tmp_path: Path) -> None:
    edges().save(tmp_path / "e.png")
    expected = latent(pipe, control={"canny": edges()})
    array = np.asarray(edges().convert("RGB"))
    same: list[Any] = [
        Control("canny", edges()),
        [Control("canny", array)],
        {"canny": tmp_path / "e.png"},
        {"canny": Control("anything", [edges()])},
        {"canny": torch.from_numpy(array.copy()).permute(2, 0, 1)},
        {"canny": Control("canny", edges(), scale=[1.0] * 4, mask=np.ones((5, 5)))},
    ]
    for control in same:
        assert torch.equal(latent(pipe, control=control), expected)


def test_strengths_of_any_number_type(pipe: VARControlPipeline) -> None:
    expected = latent(pipe, control=Control("canny", edges(), scale=0.5))
    for scale in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), np.full(4, 0.5), torch.full((4,), 0.5).bfloat16()):
        out = pipe(PROMPT, seed=1, control=Control("canny", edges(), scale=scale))  # type: ignore[arg-type]
        assert torch.equal(out.latent, expected)
        assert out.settings[0]["control"][0]["scale"] in (0.5, [0.5] * 4)


def test_thin_lines_of_a_large_map_are_kept(pipe: VARControlPipeline) -> None:
    drawn = np.zeros((256, 256), np.uint8)
    drawn[100] = 255
    small = np.zeros((32, 32), np.uint8)
    small[12] = 255
    assert torch.equal(latent(pipe, control={"canny": drawn}), latent(pipe, control={"canny": small}))


def test_window_follows_the_rule_of_diffusers(pipe: VARControlPipeline) -> None:
    windowed = latent(pipe, control=Control("canny", edges(), start=0.25, end=0.75))
    assert torch.equal(windowed, latent(pipe, control=Control("canny", edges(), scale=[0, 1, 1, 0])))


def test_several_controls_in_any_order(pipe: VARControlPipeline) -> None:
    one, two = Control("canny", edges(), scale=0.5), Control("depth", edges(1))
    both = pipe(PROMPT, seed=1, control=[one, two])
    assert torch.equal(both.latent, latent(pipe, control=[two, one]))
    assert not torch.equal(both.latent, latent(pipe, control=one))
    assert [entry["kind"] for entry in both.settings[0]["control"]] == ["canny", "depth"]


def test_an_encoded_control_serves_all_prompts_and_seeds(pipe: VARControlPipeline) -> None:
    encoded = pipe.encode_control(edges(), "canny")
    prompts = ["a red cube", "a tree"]
    expected = latent(pipe, prompts, num_images_per_prompt=2, control={"canny": edges()})
    assert torch.equal(latent(pipe, prompts, num_images_per_prompt=2, control={"canny": encoded}), expected)
    assert torch.equal(latent(pipe, "a tree", seed=3, control={"canny": encoded}), expected[2:3])
    wide = pipe.encode_control(edges(), "canny", schedule=ScaleSchedule(((1, 1), (2, 4)), (4, 4), 8))
    with pytest.raises(ValueError, match="was encoded for 32x16, the picture is 32x32"):
        pipe(PROMPT, control={"canny": wide})
    with pytest.raises(ValueError, match='encoded as "canny"'):
        pipe(PROMPT, control={"depth": encoded})


def test_one_control_image_per_prompt(pipe: VARControlPipeline) -> None:
    images = [edges(0), edges(1)]
    both = latent(pipe, ["a red cube", "a tree"], control={"canny": images}, num_images_per_prompt=2)
    assert torch.equal(both[:2], latent(pipe, "a red cube", control={"canny": images[0]}, num_images_per_prompt=2))
    assert torch.equal(both[2:], latent(pipe, "a tree", seed=3, control={"canny": images[1]}, num_images_per_prompt=2))
    with pytest.raises(ValueError, match="2 images for 3 prompts; pass 1 or 3"):
        pipe(["a", "a", "a"], control={"canny": images})


def test_a_control_of_another_size_meets_the_resize_rule(
    pipe: VARControlPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    big = edges().resize((64, 64), Image.Resampling.NEAREST)
    assert torch.equal(latent(pipe, control={"canny": big}), latent(pipe, control={"canny": edges()}))
    assert not caplog.text
    wide = edges(size=(64, 32))
    crop = latent(pipe, control={"canny": wide})
    assert 'control "canny" is 64x32 but the picture 32x32' in caplog.text and 'resize="pad"' in caplog.text
    assert torch.equal(crop, latent(pipe, control={"canny": wide.crop((16, 0, 48, 32))}))
    caplog.clear()
    assert not torch.equal(latent(pipe, control=Control("canny", wide, resize="pad")), crop)
    stretched = np.asarray(wide).reshape(32, 32, 2).max(axis=2)  # no line is lost
    assert torch.equal(
        latent(pipe, control=Control("canny", wide, resize="stretch")), latent(pipe, control={"canny": stretched})
    )
    assert not caplog.text


def test_control_guidance(pipe: VARControlPipeline) -> None:
    control = {"canny": edges()}
    plain = latent(pipe, control=control)
    assert torch.equal(latent(pipe, control=control, control_guidance_scale=1.0), plain)
    strong = pipe(PROMPT, seed=1, control=control, control_guidance_scale=2.0)
    assert not torch.equal(strong.latent, plain) and strong.settings[0]["control_guidance_scale"] == 2.0


def test_control_guidance_of_the_model(pipe: VARControlPipeline) -> None:
    control, off = {"canny": edges()}, Control("canny", edges(), scale=0)
    strong = latent(pipe, control=control, control_guidance_scale=2.0)
    plain, layered = latent(pipe), latent(pipe, control=control, guidance_layer=1)
    own = {name: getattr(pipe, name) for name in ("transformer", "vae", "text_encoder", "tokenizer")}
    numbers = {name: pipe.config[name] for name in ("schedule", "guidance_scale", "temperature", "top_k", "top_p")}
    other = VARControlPipeline(**own, **{**numbers, "control_guidance_scale": 2.0})
    other.controls = pipe.controls
    assert torch.equal(latent(other, control=control), strong)
    assert torch.equal(latent(other), plain) and torch.equal(latent(other, control=off), plain)
    assert torch.equal(latent(other, control=control, guidance_layer=1), layered)


def test_an_adapter_that_reads_the_prompt() -> None:
    pipe = tiny_pipeline()
    add_tiny_control(pipe, condition_modulation="text")
    encoded = pipe.encode_control([edges(0), edges(1)], "canny")
    both = latent(pipe, ["a red cube", "a tree"], control={"canny": encoded}, num_images_per_prompt=2)
    single = latent(pipe, "a tree", seed=3, control={"canny": edges(1)}, num_images_per_prompt=2)
    torch.testing.assert_close(both[2:], single)
    assert not torch.equal(single, latent(pipe, "a tree", seed=3, num_images_per_prompt=2))


# strength and window


def test_strength_as_a_function_of_the_scale(pipe: VARControlPipeline) -> None:
    seen: list[ScaleStep] = []

    def rising(step: ScaleStep) -> float:
        seen.append(step)
        return step.index / 4 if not step.is_last else np.float32(2)  # type: ignore[return-value]

    out = pipe(PROMPT, seed=1, control=Control("canny", edges(), scale=rising))
    assert [step.index for step in seen] == [0, 1, 2, 3]  # asked once for each scale
    numbers = [0, 0.25, 0.5, 2]
    assert torch.equal(out.latent, latent(pipe, control=Control("canny", edges(), scale=numbers)))
    assert out.settings[0]["control"][0]["scale"] == numbers  # the file keeps what it gave


@pytest.mark.parametrize(
    ("scales", "indices"),
    [(slice(2, None), [2, 3]), (slice(-1), [0, 1, 2]), (range(1, 3), [1, 2]), ([3, 0], [0, 3]), ([-1], [3]), ([], [])],
)
def test_scales_by_index(pipe: VARControlPipeline, scales: Any, indices: list[int]) -> None:
    out = pipe(PROMPT, seed=1, control=Control("canny", edges(), scales=scales))
    numbers = [float(index in indices) for index in range(4)]
    assert torch.equal(out.latent, latent(pipe, control=Control("canny", edges(), scale=numbers)))
    entry = out.settings[0]["control"][0]
    assert entry["scales"] == indices and entry["scale"] == 1.0
    again = Control(entry["kind"], edges(), scales=entry["scales"])
    assert torch.equal(latent(pipe, control=again), out.latent)


def test_scales_and_a_window_must_both_hold(pipe: VARControlPipeline) -> None:
    both = Control("canny", edges(), scales=slice(1, None), end=0.75)  # 1, 2, 3 and 0, 1, 2
    assert torch.equal(latent(pipe, control=both), latent(pipe, control=Control("canny", edges(), scales=[1, 2])))


# masks


def test_a_control_acts_inside_its_mask(pipe: VARControlPipeline) -> None:
    control = Control("canny", edges(), scales=[3])  # one scale: later ones carry no change to the other side
    plain, full = latent(pipe), latent(pipe, control=control)
    masked = latent(pipe, control=replace(control, mask=half()))
    assert not torch.equal(masked, plain)
    assert not torch.equal(masked[..., 4:], full[..., 4:])  # outside: not what the whole control draws
    everywhere = replace(control, scales=None)
    soft = latent(pipe, control=replace(everywhere, mask=Image.new("L", (32, 32), 153)))  # six tenths
    torch.testing.assert_close(soft, latent(pipe, control=replace(everywhere, scale=0.6)))
    assert not torch.equal(soft, latent(pipe, control=everywhere)) and not torch.equal(soft, plain)


def test_tokens_outside_the_mask_get_nothing_from_the_control() -> None:
    pipe = tiny_pipeline()
    add_tiny_control(pipe, inject_blocks=(2,))  # the last block: no later one carries the change across
    listeners = [Listener() for _ in range(3)]
    control = Control("canny", edges(), scales=[3])
    for listener, given in zip(listeners, (None, control, replace(control, mask=half())), strict=True):
        latent(pipe, control=given, sampler=listener)
    plain, full, masked = (listener.heard[3].unflatten(1, (4, 4)) for listener in listeners)  # (B, h, w, 2N)
    assert torch.equal(masked[:, :, 2:], plain[:, :, 2:]) and not torch.equal(full[:, :, 2:], plain[:, :, 2:])
    torch.testing.assert_close(masked[:, :, :2], full[:, :, :2])
    assert not torch.equal(masked[:, :, :2], plain[:, :, :2])


def test_every_control_and_every_prompt_has_its_mask(pipe: VARControlPipeline) -> None:
    left, right = half(), 255 - half()
    canny, depth = Control("canny", edges(), mask=[left, right]), Control("depth", edges(1), mask=right)
    both = latent(pipe, ["a red cube", "a tree"], control=[canny, depth], num_images_per_prompt=2)
    for row, (prompt, mask) in enumerate((("a red cube", left), ("a tree", right))):
        own = [replace(canny, mask=mask), depth]
        alone = latent(pipe, prompt, seed=1 + 2 * row, control=own, num_images_per_prompt=2)
        assert torch.equal(both[2 * row : 2 * row + 2], alone)
    swapped = latent(pipe, "a tree", seed=3, control=[canny, depth][1], num_images_per_prompt=2)
    assert not torch.equal(both[2:], swapped)


def test_masked_to_nothing_is_no_control_whatever_the_guidance(pipe: VARControlPipeline) -> None:
    nothing = Control("canny", edges(), mask=np.zeros((8, 8), np.uint8))
    other = Control("depth", edges(1))
    assert torch.equal(latent(pipe, control=nothing, control_guidance_scale=3.0), latent(pipe))
    assert torch.equal(
        latent(pipe, control=[nothing, other], control_guidance_scale=3.0),
        latent(pipe, control=other, control_guidance_scale=3.0),
    )


# guidance of several


def test_own_guidance_of_one_control_is_that_of_the_call(pipe: VARControlPipeline) -> None:
    canny, depth = Control("canny", edges()), Control("depth", edges(1))
    for scale in (2.0, [3.0, 2.0, 1.0, 1.0]):
        expected = latent(pipe, control=canny, control_guidance_scale=scale)
        own = pipe(PROMPT, seed=1, control=replace(canny, control_guidance_scale=scale))
        assert torch.equal(own.latent, expected)
        assert own.settings[0]["control"][0]["control_guidance_scale"] == (scale if scale == 2.0 else [3, 2, 1, 1])
        together = [replace(one, control_guidance_scale=scale) for one in (canny, depth)]
        shared = latent(pipe, control=[canny, depth], control_guidance_scale=scale)
        assert torch.equal(latent(pipe, control=together), shared)
        assert torch.equal(latent(pipe, control=[together[0], depth], control_guidance_scale=scale), shared)
    off = [replace(one, control_guidance_scale=1) for one in (canny, depth)]
    assert torch.equal(latent(pipe, control=off), latent(pipe, control=[canny, depth]))
    assert torch.equal(latent(pipe, control=off, control_guidance_scale=5.0), latent(pipe, control=[canny, depth]))


def test_several_weights_follow_the_formula(pipe: VARControlPipeline) -> None:
    add_tiny_control(pipe, "pose", 5)
    try:
        # canny and pose share a weight, depth has another
        canny = Control("canny", edges(), control_guidance_scale=2.5)
        pose = Control("pose", edges(2), control_guidance_scale=2.5)
        depth = Control("depth", edges(1), control_guidance_scale=0.5)
        whole, text = (canny, depth, pose), 3.0
        guided = first_logits(pipe, *whole, guidance_scale=text)

        def branch(*controls: Control, scale: float = 0.0) -> Tensor:
            """One term of the formula: the prompt is in it at scale 1 and not in it at 0."""
            own = [replace(control, control_guidance_scale=None) for control in controls]
            return first_logits(pipe, *own, guidance_scale=scale)

        both, null = branch(*whole), branch()
        expected = both + text * (branch(*whole, scale=1.0) - both)
        expected += 1.5 * (branch(canny, pose) - null) - 0.5 * (branch(depth) - null)
        torch.testing.assert_close(guided, expected)
        assert not torch.allclose(guided, first_logits(pipe, *whole[:2], guidance_scale=text))
        drawn = latent(pipe, control=[canny, depth, pose])
        for order in ([pose, canny, depth], [depth, pose, canny]):
            assert torch.equal(latent(pipe, control=order), drawn)
        # a control without a weight of its own is not weighed apart
        plain = replace(depth, control_guidance_scale=None)
        one = replace(depth, control_guidance_scale=1.0)
        assert torch.equal(latent(pipe, control=[canny, plain]), latent(pipe, control=[canny, one]))
    finally:
        pipe.unload_control("pose")


def test_branches_of_one_control_end_before_those_of_another(pipe: VARControlPipeline) -> None:
    def drawn(last: float) -> list[Tensor]:
        canny = Control("canny", edges(), control_guidance_scale=[2, 2, last, last])
        depth = Control("depth", edges(1), control_guidance_scale=[3, 3, 3, last])
        return pipe(PROMPT, seed=1, control=[canny, depth], output_type="latent").codes

    ended, kept = drawn(1.0), drawn(1.0 + 1e-7)
    assert all(torch.equal(one, other) for one, other in zip(ended, kept, strict=True))


# batches


def test_a_picture_under_several_controls_does_not_depend_on_its_batch(pipe: VARControlPipeline) -> None:
    prompts, seeds = ["a red cube", "", "a small green house on grass"], [4, 5, 4, 9, 7, 7]
    images = [edges(number) for number in range(3)]
    masks = [half(), 255 - half(), np.full((32, 32), 255, np.uint8)]

    def controls(canny: Any, mask: Any) -> list[Control]:
        return [
            Control("canny", canny, scale=0.7, control_guidance_scale=2.0),
            Control("depth", edges(3), mask=mask, scales=slice(1, None)),
        ]

    batch = pipe(prompts, seed=seeds, control=controls(images, masks), num_images_per_prompt=2, output_type="latent")
    for row, seed in enumerate(seeds):
        own = controls(images[row // 2], masks[row // 2])
        single = pipe(prompts[row // 2], seed=seed, control=own, output_type="latent")
        assert all(torch.equal(one[0], many[row]) for one, many in zip(single.codes, batch.codes, strict=True))


def test_a_list_of_encoded_controls(pipe: VARControlPipeline) -> None:
    images, prompts = [edges(0), edges(1)], ["a red cube", "a tree"]
    expected = latent(pipe, prompts, control={"canny": images}, num_images_per_prompt=2)
    each = [pipe.encode_control(image, "canny") for image in images]
    assert torch.equal(latent(pipe, prompts, control={"canny": each}, num_images_per_prompt=2), expected)
    together = pipe.encode_control(images, "canny")
    assert torch.equal(latent(pipe, prompts, control={"canny": together}, num_images_per_prompt=2), expected)
    joined = EncodedControl.join([*each, each[0]])
    assert len(joined) == 3 and joined.bank is not None and joined.bank.rows == 3
    with pytest.raises(ValueError, match="3 images for 2 prompts; pass 1 or 2"):
        pipe(prompts, control={"canny": joined})
    with pytest.raises(ValueError, match="encoded as 'canny' for 32x32 and as 'depth' for 32x32"):
        pipe(prompts, control={"canny": [each[0], pipe.encode_control(edges(), "depth")]})
    with pytest.raises(ValueError, match="image is a EncodedControl"):
        pipe(prompts, control={"canny": [edges(), each[0]]})


# ablations


def test_joint_and_separate_controls_together() -> None:
    pipe = tiny_pipeline()
    add_tiny_control(pipe, "canny", 1)
    add_tiny_control(pipe, "depth", 2, fusion="joint", scope="causal", inject_blocks="last_half")
    canny, depth = Control("canny", edges()), Control("depth", edges(1))
    both = latent(pipe, control=[canny, depth])
    assert torch.equal(latent(pipe, control=[depth, canny]), both)
    for one in (canny, depth):
        assert not torch.equal(latent(pipe, control=one), both)
    assert torch.equal(latent(pipe, control=[canny, replace(depth, scale=0)]), latent(pipe, control=canny))
    assert torch.equal(latent(pipe, control=[replace(canny, scale=0), depth]), latent(pipe, control=depth))
    weighed = [replace(canny, control_guidance_scale=2.0), depth]
    assert not torch.equal(latent(pipe, control=weighed), both)
    batch = latent(pipe, [PROMPT, "a tree"], control=weighed)
    assert torch.equal(batch[1:], latent(pipe, "a tree", seed=2, control=weighed))


# what callers get wrong


def test_a_photo_in_place_of_a_map_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipeline()
    add_tiny_control(pipe, "canny", detector="opencv-canny")
    add_tiny_control(pipe, "skeleton", kind="pose")
    photo = Image.fromarray(np.random.default_rng(0).integers(40, 220, (32, 32, 3), dtype=np.uint8))
    drawing = np.zeros((32, 32, 3), np.uint8)
    drawing[4:28, 15:18] = (255, 85, 0)
    for control in ({"canny": edges()}, {"skeleton": drawing}):
        pipe(PROMPT, control=control, stop_after=1)
    assert not caplog.text
    pipe(PROMPT, control={"canny": photo}, stop_after=1)
    assert 'control "canny" got a picture with many tones' in caplog.text
    pipe(PROMPT, control={"skeleton": photo}, stop_after=1)
    assert 'control "skeleton" got a picture that is not mostly black' in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"control": edges()}, 'pass {"canny": image}'),
        ({"control": {"pose": edges()}}, 'control "pose" is not loaded; there is canny, depth'),
        ({"control": {"canny": None}}, 'control "canny" image is a NoneType'),
        ({"control": {"canny": []}}, "empty list"),
        ({"control": {"canny": "nowhere.png"}}, "no file 'nowhere.png'"),
        ({"control": Control("canny", edges(), resize="fill")}, "resize='fill'"),
        ({"control": Control("canny", edges(), scale=[1.0])}, 'control "canny": .*1 values but there are 4 scales'),
        ({"control": Control("canny", edges(), scale=float("nan"))}, 'control "canny": .*finite'),
        ({"control": Control("canny", edges(), scale=[1, 1, float("inf"), 1])}, 'control "canny": .*finite'),
        ({"control": Control("canny", edges(), scale=-1)}, "negative"),
        ({"control": Control("canny", edges(), start=0.8, end=0.2)}, "start <= end"),
        ({"control": Control("canny", edges(), mask=np.full((4, 4), np.nan))}, 'mask of control "canny" holds NaN'),
        ({"control": Control("canny", edges(), mask=[half(), half()])}, "has 2 masks for one prompt; pass one"),
        ({"control": Control("canny", edges(), mask=[])}, "empty list"),
        ({"control": Control("canny", edges(), scales=[4])}, 'control "canny": scales is .*indices from 0 to 3'),
        ({"control": Control("canny", edges(), scales="2:3")}, "pass a slice, a range or a list"),
        ({"control": Control("canny", edges(), scale=lambda step: -1)}, 'control "canny": .*negative'),
        ({"control": Control("canny", edges(), scale=lambda step: None)}, 'control "canny": control scale'),
        (
            {"control": Control("canny", edges(), control_guidance_scale=[1, 2])},
            'control "canny": control_guidance_scale has 2 values but there are 4 scales',
        ),
        (
            {"guidance_layer": 1, "control": Control("canny", edges(), control_guidance_scale=2)},
            "pass one of them",
        ),
    ],
)
def test_mistakes_are_explained(pipe: VARControlPipeline, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": PROMPT, **arguments})


def test_a_window_without_a_scale_is_noticed(caplog):
    pipe = tiny_pipeline("canny")
    for nowhere in ({"scales": slice(7, 9)}, {"scales": []}, {"end": 0.1}):
        pipe("a red cube", control=Control("canny", edges(), **nowhere), seed=0, stop_after=1)
        assert 'control "canny" acts at none of the 4 scales' in caplog.text
        caplog.clear()
    for meant in ({"scale": 0.0}, {"scales": [3]}):
        pipe("a red cube", control=Control("canny", edges(), **meant), seed=0, stop_after=1)
    assert "acts at none" not in caplog.text
