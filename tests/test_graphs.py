"""Recorded calls: the pictures of the plain run, whatever lay in the buffers; and a loop that never asks the device.

Without a GPU a recording is the run itself, repeated on the same buffers, which shows all but the graphs themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny import tiny_backbone, tiny_schedule, tiny_text
from tiny_pipeline import PROMPT, add_tiny_control, edges, latent, tiny_pipeline
from torch import Tensor
from torch.testing import assert_close

from scaleweaver.cache import KVCache, NoCache, SlidingWindow
from scaleweaver.conditions import build, make_generators
from scaleweaver.contracts import Control, Injection, SamplerState, TextContext, TextFeatures
from scaleweaver.graphs import GraphedBackbone
from scaleweaver.guidance import ClassifierFreeGuidance, ControlGuidance
from scaleweaver.kernels.dispatch import use_kernels
from scaleweaver.loop import SingleModel, generate
from scaleweaver.lora import add_lora, lora_layers
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.reference import ReferenceBank, ReferenceInjector
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import ScaleSchedule, ScaleStep
from scaleweaver.styles import set_styles
from scaleweaver.tokenizers.target import ResidualTarget

WIDE = ScaleSchedule(((1, 1), (1, 2), (2, 4), (3, 6)), position_grid=(3, 6), stride=8)
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

# what a call may vary in, one after the other on the same graphs
CALLS: list[dict[str, Any]] = [
    {},
    {"seed": 5},
    {"prompt": "a small green ball on grass"},  # longer
    {"prompt": "house", "negative_prompt": "a tree"},  # prompt and negative one of different lengths: masked
    {"prompt": ["a red cube", "a small house on grass"], "num_images_per_prompt": 2},
    {"guidance_scale": [3.0, 2.0, 1.0, 1.0]},  # rows drop
    {"guidance_scale": 1.0},
    {"control": {"canny": edges()}},
    {"control": {"canny": edges(1)}, "prompt": "a tree"},
    {"control": [Control("canny", edges(2), scale=0.4), Control("depth", edges(3), start=0.3)]},
    {"control": {"canny": edges(4)}, "control_guidance_scale": [2.0, 2.0, 1.0, 1.0], "num_images_per_prompt": 2},
    {"control": {"canny": [edges(5), edges(6)]}, "prompt": ["a cube", "a tree on grass"]},
    {"control": Control("canny", edges(7), mask=edges(8))},
    {"schedule": WIDE},
    {"stop_after": 3},
    {},
]


def again(run: Callable[[], None]) -> Callable[[], None]:
    """What stands for a graph where there is no GPU."""
    return run


@pytest.fixture(scope="module")
def pipe() -> Iterator[VARControlPipeline]:
    made = tiny_pipeline("canny")
    add_tiny_control(made, "depth", seed=1, fusion="joint", scope="causal", locality=0.5)
    yield made.to(DEVICE)


def graphed(pipe: VARControlPipeline, **settings: Any) -> GraphedBackbone:
    return GraphedBackbone(pipe.transformer, recorder=None if GPU else again, **settings)


def context(pipe: VARControlPipeline, lengths: Sequence[int] = (5, 3)) -> TextContext:
    text = tiny_text(lengths)
    return pipe.transformer.encode_text(TextFeatures(text.features.to(DEVICE), text.lengths))


def poison(graphs: GraphedBackbone) -> None:
    """Fill every buffer with what would show."""
    for flat in graphs._memory.flat.values():
        flat.fill_(torch.nan if flat.is_floating_point() else 1)


def test_recorded_pictures_are_those_of_the_plain_run(pipe: VARControlPipeline) -> None:
    graphs = graphed(pipe)
    for call in CALLS:
        poison(graphs)
        assert torch.equal(latent(pipe, **{"router": SingleModel(graphs), **call}), latent(pipe, **call)), call
    assert set(graphs.counts) == {"recordings", "replays"}  # nothing was passed on
    # buffers have grown on the way, and graphs that knew the smaller ones are recorded again; then all is known
    for call in CALLS[::-1]:
        latent(pipe, **{"router": SingleModel(graphs), **call})
    recorded = graphs.counts["recordings"]
    for call in CALLS:
        latent(pipe, **{"router": SingleModel(graphs), **call})
    assert graphs.counts["recordings"] == recorded


def test_on_kernels(pipe: VARControlPipeline) -> None:
    pytest.importorskip("triton")
    graphs = graphed(pipe)
    call = {"control": {"canny": edges()}, "guidance_scale": [3.0, 3.0, 3.0, 1.0]}
    with use_kernels(True):
        plain = latent(pipe, **call)
        assert torch.equal(latent(pipe, router=SingleModel(graphs), **call), plain)
    assert torch.equal(latent(pipe, router=SingleModel(graphs), **call), latent(pipe, **call))
    assert graphs.counts["recordings"] == 8  # kernels and formulas are different graphs


def test_old_graphs_make_room(pipe: VARControlPipeline) -> None:
    graphs = graphed(pipe, most=3)
    router = SingleModel(graphs)
    first = latent(pipe, router=router)
    newest = [weakref.ref(graph) for graph in graphs._graphs.values()]
    assert graphs.kept == 3 and torch.equal(first, latent(pipe))
    assert torch.equal(latent(pipe, router=router, seed=3), latent(pipe, seed=3))
    assert graphs.counts["recordings"] == 8 and not any(reference() for reference in newest)
    graphs.clear()
    assert graphs.kept == 0 and graphs.nbytes() == 0
    assert torch.equal(latent(pipe, router=router), first)
    with pytest.raises(ValueError, match="from 1 on"):
        GraphedBackbone(pipe.transformer, most=0)


def test_prompts_of_nearby_lengths_share_graphs(pipe: VARControlPipeline) -> None:
    graphs = graphed(pipe, text_multiple=8)
    steps = tiny_schedule().steps[:1]
    with torch.inference_mode():
        for lengths in ((3, 3), (8, 5), (4, 4)):
            poison(graphs)
            text = context(pipe, lengths)
            assert_close(graphs(None, steps, text, KVCache()), pipe.transformer(None, steps, text, KVCache()))
    assert graphs.counts == {"recordings": 1, "replays": 3}


class Louder:
    """An injector of somebody else's."""

    def needs_lse(self, layer: int) -> bool:
        return False

    def keys(self, layer: int, steps: Any, q: Tensor) -> None:
        return None

    def inject(
        self, layer: int, steps: Any, q: Tensor, attended: Tensor, lse: Tensor | None, read: Any = None
    ) -> Injection:
        return Injection(attended * 1.5)

    def select_rows(self, rows: Tensor) -> Louder:
        return self


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"cache": NoCache()}, "NoCache decides anew"),
        ({"cache": SlidingWindow(9)}, "SlidingWindow decides anew"),
        ({"guidance_layer": 1}, "guidance acts inside the network"),
    ],
)
def test_what_is_not_recorded(
    pipe: VARControlPipeline, call: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = graphed(pipe)
    assert torch.equal(latent(pipe, router=SingleModel(graphs), **call), latent(pipe, **call))
    assert graphs.kept == 0 and [name for name in graphs.counts if reason in name]
    assert len([record for record in caplog.records if reason in record.message]) == 1  # said once, not at every scale


def test_other_calls_that_are_not_recorded(pipe: VARControlPipeline) -> None:
    graphs = graphed(pipe)
    steps, text = tiny_schedule().steps, context(pipe)

    def reason(given: Any = None, **settings: Any) -> str:
        before = set(graphs.counts)
        graphs(given, settings.pop("steps", steps[:1]), text, KVCache(), **settings)
        return "".join(set(graphs.counts) - before)

    assert "gradients" in reason()
    with torch.no_grad():
        assert "Louder" in reason(injectors=(Louder(),))
        inputs = torch.zeros(2, 29, pipe.transformer.config.bits, device=DEVICE)
        assert "several scales" in reason(inputs, steps=steps)
        assert "does not hold" in reason(inputs[:, :4], steps=steps[1:2])
        pipe.transformer.train()
        assert "training mode" in reason()
        pipe.transformer.eval()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert "autocast" in reason()
    assert graphs.kept == 0


@pytest.mark.skipif(GPU, reason="where there is a GPU it records")
def test_without_a_gpu_the_plain_backbone_draws(pipe: VARControlPipeline) -> None:
    plain = latent(pipe)
    pipe.enable_graphs(most=20)
    assert torch.equal(latent(pipe), plain) and pipe.graphs is not None and pipe.graphs.kept == 0
    assert "need an NVIDIA GPU" in next(iter(pipe.graphs.counts))
    pipe.disable_graphs()
    assert pipe.graphs is None and torch.equal(latent(pipe), plain)


def test_a_recording_that_fails_is_not_tried_again(pipe: VARControlPipeline) -> None:
    tried = []

    def fails(run: Callable[[], None]) -> Callable[[], None]:
        tried.append(run)
        raise torch.OutOfMemoryError("no memory for this graph")

    graphs = GraphedBackbone(pipe.transformer, recorder=fails)
    for _ in range(2):
        assert torch.equal(latent(pipe, router=SingleModel(graphs)), latent(pipe))
    assert len(tried) == 4 and "no memory" in next(iter(graphs.counts))


def test_a_picture_within_a_picture(pipe: VARControlPipeline) -> None:
    graphs = graphed(pipe)
    router, inner = SingleModel(graphs), []

    def draw_another(*given: Any) -> None:
        inner.append(latent(pipe, "a tree", router=router, seed=9))

    outer = latent(pipe, router=router, callback_on_step_end=draw_another)
    assert torch.equal(outer, latent(pipe))
    assert all(torch.equal(one, latent(pipe, "a tree", seed=9)) for one in inner)
    assert graphs.counts["another picture is being drawn"] == 4 * 4


class KeepLast:
    """A search that goes on with the last image, twice."""

    def select(self, state: SamplerState, step: ScaleStep) -> Tensor | None:
        images = len(state.latent)
        return torch.tensor([images - 1, images - 1]) if step.index == 1 else None


def test_with_a_search(pipe: VARControlPipeline) -> None:
    graphs = graphed(pipe)
    call = {"search": KeepLast(), "num_images_per_prompt": 3, "control": {"canny": edges()}}
    assert torch.equal(latent(pipe, router=SingleModel(graphs), **call), latent(pipe, **call))
    assert set(graphs.counts) == {"recordings", "replays"}


def test_changed_weights_show() -> None:
    pipe = tiny_pipeline("canny").to(DEVICE)
    backbone = pipe.transformer
    add_lora(backbone, "style", pattern=r"blocks\.0\.ffn\.fc1", rank=2, alpha=2)
    for _, layer in lora_layers(backbone, "style"):
        torch.nn.init.ones_(layer.lora_B["style"].weight)
    graphs = graphed(pipe)

    def check() -> Tensor:
        plain = latent(pipe)
        assert torch.equal(latent(pipe, router=SingleModel(graphs)), plain)
        return plain

    first = check()
    with torch.no_grad():  # in place: the graphs read the new numbers where the old ones were
        backbone.head.weight.mul_(-1)
    assert not torch.equal(check(), first) and graphs.counts["recordings"] == 4
    set_styles(backbone, {"style": 3.0})
    styled = check()
    assert graphs.counts["recordings"] == 8 and not torch.equal(styled, check_without(pipe, first))
    backbone.head.weight = torch.nn.Parameter(-backbone.head.weight.detach())
    assert not torch.equal(check(), styled) and graphs.counts["recordings"] == 12


def test_quantised_weights() -> None:
    pytest.importorskip("torchao")
    pipe = tiny_pipeline().to(DEVICE)
    graphs, steps = graphed(pipe), tiny_schedule().steps[:1]

    def logits(network: Any) -> Tensor:
        with torch.inference_mode():
            drawn: Tensor = network(None, steps, context(pipe), KVCache())
            return drawn.clone()

    before = logits(graphs)
    pipe.quantize()
    rounded = logits(graphs)
    assert torch.equal(rounded, logits(pipe.transformer)) and not torch.equal(rounded, before)
    assert graphs.counts == {"recordings": 2, "replays": 2}


def check_without(pipe: VARControlPipeline, first: Tensor) -> Tensor:
    set_styles(pipe.transformer, {})
    plain = latent(pipe)
    set_styles(pipe.transformer, {"style": 3.0})
    return plain


def test_a_control_is_read_in_one_pass(pipe: VARControlPipeline) -> None:
    seen: list[tuple[int, ...]] = []
    hooks = [
        block.attn.qkv.register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape)))
        for block in pipe.transformer.blocks
    ]
    encoded = pipe.encode_control(edges(), "canny")
    for hook in hooks:
        hook.remove()
    assert encoded.bank is not None
    layers, width = len(encoded.bank.values), pipe.transformer.config.width
    assert seen == [(1, tiny_schedule().length, width)] * layers  # all scales at once, once a layer


# the loop on a device that holds no numbers: whatever asks it for one, raises


def draw_on_meta(sampler: BitwiseSampler, mask: bool = False) -> list[Tensor]:
    schedule, images = tiny_schedule(), 2
    backbone = tiny_backbone().to("meta")
    adapter_pipe = tiny_pipeline("canny")
    adapter = adapter_pipe.controls["canny"].to("meta")
    shape = (images, backbone.config.heads, schedule.length, backbone.config.width // backbone.config.heads)
    layers = adapter.blocks
    bank = ReferenceBank(
        {layer: torch.empty(shape, device="meta") for layer in layers},
        {layer: torch.empty(shape, device="meta") for layer in layers},
        schedule,
    )
    guidance = ControlGuidance([3, 3, 1, 1], [[2, 1, 1, 1]], len(schedule))
    injector = ReferenceInjector(
        bank, adapter, (1.0,) * 4, guidance.sees_control(0), torch.rand(1, 1, 32, 32) if mask else None, images
    )
    conditions = build(
        backbone, tiny_text((4, 4)), generators=make_generators(1, images), branches=guidance.branches,
        injectors=(injector,),
    )  # fmt: skip
    target = ResidualTarget(3, 2)
    with torch.inference_mode():
        drawn = generate(
            conditions, schedule, router=SingleModel(backbone), target=target, guidance=guidance, sampler=sampler,
            forced=[torch.zeros(images, 1, target.width, dtype=torch.uint8)],
        )  # fmt: skip
    return drawn.codes


@pytest.mark.parametrize("mask", [False, True])
def test_nothing_waits_for_the_device_between_scales(mask: bool) -> None:
    codes = draw_on_meta(BitwiseSampler(0.5, top_p=0.9), mask)
    assert [tuple(scale.shape) for scale in codes] == [(2, n, 12) for n in (1, 4, 9, 16)]
    assert all(scale.is_meta for scale in codes)


class Curious(BitwiseSampler):
    """Looks at a number before it goes on."""

    def sample(self, logits: Tensor, step: ScaleStep, generators: Any) -> Tensor:
        if logits.max() > 0:
            return super().sample(logits, step, generators)
        return super().sample(-logits, step, generators)


def test_what_waits_would_be_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        draw_on_meta(Curious())


def test_guidance_that_mixes_inside_is_told_from_one_that_does_not() -> None:
    step = tiny_schedule().steps[0]
    probe = torch.zeros(4, 1, 1)
    inside, outside = ClassifierFreeGuidance(3.0, 4, insert_after=1), ClassifierFreeGuidance(3.0, 4)
    assert outside.mix(1, probe, step) is probe and inside.mix(0, probe, step) is probe
    assert inside.mix(1, probe, step) is not probe


def test_offloading_brings_one_component_after_the_other() -> None:
    pipe = tiny_pipeline("canny").to(DEVICE)
    plain = latent(pipe, control={"canny": edges()})
    pipe.enable_model_cpu_offload(device=DEVICE)
    order: list[str] = []
    for name in ("text_encoder", "transformer", "vae"):
        hook = getattr(pipe, name)._hf_hook
        inner = hook.pre_forward

        def note(module: Any, *args: Any, name: str = name, inner: Any = inner, **kwargs: Any) -> Any:
            if not order or order[-1] != name:
                order.append(name)
            return inner(module, *args, **kwargs)

        hook.pre_forward = note
    pictures = pipe(PROMPT, control={"canny": edges()}, seed=1)
    assert torch.equal(pictures.latent.cpu(), plain.cpu())
    # the control is encoded by the tokenizer and read by the transformer before anything is drawn
    assert order == ["text_encoder", "vae", "transformer", "vae"]
    with torch.inference_mode():  # an offloaded backbone moves, and a graph would read where it was
        graphs = graphed(pipe)
        latent(pipe, router=SingleModel(graphs))
    assert "offloading moves the backbone, or parts of it, between devices" in graphs.counts
