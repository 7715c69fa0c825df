"""Every seam of the loop: a trivial implementation changes no bit, a real one changes what it should."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import BITS, PATCH, tiny_backbone, tiny_schedule, tiny_text
from torch import Tensor

from scaleweaver.cache import FullCache, NoCache, SlidingWindow
from scaleweaver.conditions import build
from scaleweaver.contracts import Injection, LoopOutput, Route, SamplerState, Steps
from scaleweaver.guidance import ClassifierFreeGuidance, ControlGuidance
from scaleweaver.loop import SingleModel, generate
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import ScaleStep
from scaleweaver.tokenizers.target import ResidualTarget

SCHEDULE = tiny_schedule()
BACKBONE = tiny_backbone()
DEPTH = len(BACKBONE.blocks)
HISTORY = SCHEDULE.steps[-1].start


def run(backbone=BACKBONE, *, images=2, branches=None, injectors=(), guidance=None, **options: Any) -> LoopOutput:
    """`images` pictures of one prompt, seeds 0, 1, ...; everything plain unless options say otherwise."""
    guidance = guidance or ClassifierFreeGuidance([3.0, 2.0, 2.0, 1.5], len(SCHEDULE))

    def conditions(network):
        return build(
            network,
            tiny_text((5,), seed=7),  # the stream of seed 0 also made the null text
            generators=[torch.Generator().manual_seed(seed) for seed in range(images)],
            branches=branches or guidance.branches,
            images_per_prompt=images,
            injectors=injectors,
        )

    plain = {
        "router": SingleModel(backbone),
        "target": ResidualTarget(BITS, PATCH),
        "sampler": BitwiseSampler(0.8),
        "guidance": guidance,
        "conditions_for": conditions,
    }
    return generate(conditions(backbone), SCHEDULE, **{**plain, **options})


def same(a: LoopOutput, b: LoopOutput) -> bool:
    return torch.equal(a.latent, b.latent) and all(torch.equal(x, y) for x, y in zip(a.codes, b.codes, strict=True))


PLAIN = run()


# cache policy


@pytest.mark.parametrize("policy", [FullCache(), SlidingWindow(HISTORY), SlidingWindow(1000)])
def test_policy_with_a_full_budget_is_identical(policy):
    assert same(run(policy=policy), PLAIN)


@dataclass(frozen=True)
class KeepsAllByScore(FullCache):
    """Watches every query and keeps every token by its score, in order."""

    seen: list[tuple[int, ...]] = field(default_factory=list)

    def queries(self, layer: int, step: ScaleStep) -> Tensor:
        return torch.arange(step.n)

    def keep(self, layer: int, step: ScaleStep, tokens: int, scores: Tensor | None) -> Tensor:
        assert scores is not None
        self.seen.append(tuple(scores.shape))
        torch.testing.assert_close(scores.sum(-1), torch.full_like(scores[..., 0], step.n))
        return scores.topk(tokens).indices.sort().values


def test_policy_that_scores_and_keeps_all_is_identical():
    policy = KeepsAllByScore()
    assert same(run(policy=policy), PLAIN)
    assert policy.seen[0] == (4, BACKBONE.config.heads, 1) and policy.seen[-1][-1] == HISTORY


@pytest.mark.parametrize("policy", [NoCache(), SlidingWindow(3)])
def test_policy_with_a_small_budget_differs(policy):
    out = run(policy=policy)
    assert torch.equal(out.codes[0], PLAIN.codes[0])
    assert not same(out, PLAIN)


def test_no_policy_is_asked_about_the_last_scale():
    asked = []

    class Watched(FullCache):
        def commits(self, step: ScaleStep) -> bool:
            asked.append(step.index)
            return True

    run(policy=Watched())
    assert set(asked) == {0, 1, 2}


# router


@dataclass(frozen=True)
class Routes:
    """A route per scale."""

    routes: tuple[Route, ...]

    def route(self, step: ScaleStep) -> Route:
        return self.routes[step.index]


def test_router_that_names_all_layers_is_identical():
    assert same(run(router=SingleModel(BACKBONE, tuple(range(DEPTH)))), PLAIN)


def test_handing_over_to_an_equal_network_is_identical():
    twin = copy.deepcopy(BACKBONE)
    for first in (1, 2, 3):  # scales that the first network draws
        routes = tuple(Route(BACKBONE if index < first else twin) for index in range(len(SCHEDULE)))
        assert same(run(router=Routes(routes)), PLAIN)


@pytest.mark.parametrize(
    "guidance",
    [
        ClassifierFreeGuidance([3.0, 2.0, 2.0, 1.5], 4, insert_after=1),  # mixed per scale inside the one prefill
        ClassifierFreeGuidance([3.0, 2.0, 1.0, 1.0], 4),  # rows dropped before and after the change
    ],
)
def test_handing_over_respects_guidance(guidance):
    twin = copy.deepcopy(BACKBONE)
    routes = Routes(tuple(Route(BACKBONE if index < 2 else twin) for index in range(len(SCHEDULE))))
    assert same(run(router=routes, guidance=guidance), run(guidance=guidance))


def test_handing_over_to_another_network_keeps_the_prefix():
    other = tiny_backbone(seed=1)
    routes = Routes(tuple(Route(BACKBONE if index < 2 else other) for index in range(len(SCHEDULE))))
    out = run(router=routes)
    assert all(torch.equal(a, b) for a, b in zip(out.codes[:2], PLAIN.codes[:2], strict=True))
    assert not torch.equal(out.codes[2], PLAIN.codes[2])
    # what follows is what the other network says about these codes alone
    assert same(run(other, forced=out.codes[:2]), out)


def test_handing_over_needs_conditions_for_the_other_network():
    routes = Routes(tuple(Route(copy.deepcopy(BACKBONE) if index else BACKBONE) for index in range(len(SCHEDULE))))
    with pytest.raises(ValueError, match="pass conditions_for="):
        run(router=routes, conditions_for=None)


def test_fewer_layers_differ_and_stale_layers_are_freed():
    shallow = Routes(tuple(Route(BACKBONE, None if index < 2 else (0, 2)) for index in range(len(SCHEDULE))))
    tokens = []
    out = run(router=shallow, on_scale=lambda step, state: tokens.append([state.cache.tokens(i) for i in range(DEPTH)]))
    assert tokens == [[1, 1, 1], [5, 0, 5], [14, 0, 14], [14, 0, 14]]
    assert all(torch.equal(a, b) for a, b in zip(out.codes[:2], PLAIN.codes[:2], strict=True))
    assert not same(out, PLAIN)


def test_a_layer_that_is_used_again_keeps_its_history():
    gap = Routes(tuple(Route(BACKBONE, (0, 2) if index == 1 else None) for index in range(len(SCHEDULE))))
    tokens = []
    run(router=gap, on_scale=lambda step, state: tokens.append(state.cache.tokens(1)))
    assert tokens == [1, 1, 10, 10]


# search


@dataclass
class Picks:
    """Chooses given images after given scales."""

    choice: dict[int, list[int]]
    seen: list[SamplerState] = field(default_factory=list)

    def select(self, state: SamplerState, step: ScaleStep) -> Tensor | None:
        chosen = self.choice.get(step.index)
        return None if chosen is None else torch.tensor(chosen)


def test_search_that_keeps_all_in_order_is_identical():
    assert same(run(search=Picks({index: [0, 1] for index in range(len(SCHEDULE))})), PLAIN)


def test_search_can_exchange_images_with_their_guidance_rows_and_generators():
    out = run(search=Picks({1: [1, 0]}))
    assert torch.equal(out.latent, PLAIN.latent.flip(0))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(out.codes, PLAIN.codes, strict=True))


def test_search_can_shrink_the_population():
    guidance = ClassifierFreeGuidance([3.0, 2.0, 2.0, 1.0], len(SCHEDULE))  # the null half goes after the choice
    plain = run(images=3, guidance=guidance)
    rows = []
    out = run(
        images=3,
        guidance=guidance,
        search=Picks({0: [2, 0], 2: [1]}),
        on_scale=lambda step, state: rows.append((state.conditions.images, len(state.conditions.text.pooled))),
    )
    assert rows == [(3, 6), (2, 4), (2, 4), (1, 1)]
    torch.testing.assert_close(out.latent, plain.latent[:1])
    assert all(torch.equal(a, b[:1]) for a, b in zip(out.codes, plain.codes, strict=True))


def test_search_that_doubles_an_image_shares_its_prefix():
    out = run(search=Picks({1: [0, 0]}))
    assert all(torch.equal(a, b) for a, b in (codes for codes in out.codes[:2]))
    assert all(not torch.equal(a, b) for a, b in (codes for codes in out.codes[2:]))
    # the first copy is the picture that its seed gives anyway, the second is the same in every run
    assert all(torch.equal(a[0], b[0]) for a, b in zip(out.codes, PLAIN.codes, strict=True))
    assert same(run(search=Picks({1: [0, 0]})), out)


def test_search_may_grow_the_population():
    out = run(search=Picks({0: [1, 1, 0]}))
    assert out.latent.shape[0] == 3 and not torch.equal(out.latent[0], out.latent[1])
    assert torch.equal(out.codes[-1][2], PLAIN.codes[-1][0])


def test_search_after_forced_scales_keeps_codes_with_their_images():
    forced = PLAIN.codes[:3]
    out = run(search=Picks({0: [1, 0]}), forced=forced)
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(out.codes, PLAIN.codes, strict=True))


def test_search_survives_a_change_of_networks():
    twin = copy.deepcopy(BACKBONE)
    routes = Routes(tuple(Route(BACKBONE if index < 2 else twin) for index in range(len(SCHEDULE))))
    out = run(search=Picks({0: [1], 1: [0]}), router=routes)
    assert all(torch.equal(a, b[1:]) for a, b in zip(out.codes, PLAIN.codes, strict=True))


# sampler


@dataclass(frozen=True)
class Wrapped:
    """Hands through to another sampler, then keeps bit 0 at 1 if asked."""

    inner: BitwiseSampler
    fix: bool = False

    def sample(self, logits: Tensor, step: ScaleStep, generators: list[torch.Generator]) -> Tensor:
        bits = self.inner.sample(logits, step, generators)
        if self.fix:
            bits[..., 0] = 1
        return bits


def test_sampler_wrapper_is_identical():
    assert same(run(sampler=Wrapped(BitwiseSampler(0.8))), PLAIN)


def test_sampler_has_the_last_word():
    out = run(sampler=Wrapped(BitwiseSampler(0.8), fix=True))
    assert all((codes[..., 0] == 1).all() for codes in out.codes)
    assert not same(out, PLAIN)


# guidance


def test_guidance_of_one_is_identical_to_none():
    none = run(guidance=ClassifierFreeGuidance(1.0, len(SCHEDULE)))
    assert same(run(guidance=ClassifierFreeGuidance(1.0, len(SCHEDULE)), branches=2), none)
    assert same(run(guidance=ControlGuidance(1.0, [1.0], len(SCHEDULE)), branches=3), none)
    assert not same(none, PLAIN)


def test_control_guidance_without_controls_is_text_guidance():
    text = [3.0, 2.0, 2.0, 1.5]
    assert same(run(guidance=ControlGuidance(text, [[1.0] * 4], 4)), PLAIN)
    # two equal null branches cancel, whatever the weight of the control
    torch.testing.assert_close(run(guidance=ControlGuidance(text, [[2.0] * 4], 4)).latent, PLAIN.latent)


def test_guidance_inside_the_network_differs():
    assert not same(run(guidance=ClassifierFreeGuidance([3.0, 2.0, 2.0, 1.5], 4, insert_after=1)), PLAIN)


# injector


@dataclass
class Adds:
    """Adds `amount` times the attention result of the rows it sees, by one of the three ways."""

    amount: float = 0.0
    way: str = "attended"
    wants_lse: bool = False
    rows: int | None = None
    sees: Tensor | None = None  # (R,) which rows it acts on
    calls: list[tuple[int, int]] = field(default_factory=list)

    def needs_lse(self, layer: int) -> bool:
        return self.wants_lse

    def keys(self, layer: int, steps: Steps, q: Tensor) -> None:
        return None

    def inject(
        self, layer: int, steps: Steps, q: Tensor, attended: Tensor, lse: Tensor | None, read: None = None
    ) -> Injection:
        assert (lse is not None) == self.wants_lse
        assert q.shape == attended.shape and (self.rows is None or self.rows == len(q))
        self.calls.append((layer, len(q)))
        if self.amount == 0:
            return Injection(attended)
        if self.sees is not None:
            return Injection(torch.where(self.sees[:, None, None, None], attended * (1 + self.amount), attended))
        extra = self.amount * attended.transpose(1, 2).flatten(2)  # (R, L, C)
        if self.way == "before_gate":
            return Injection(attended, before_gate=extra)
        if self.way == "after_gate":
            return Injection(attended, after_gate=extra)
        return Injection(attended * (1 + self.amount))

    def select_rows(self, rows: Tensor) -> Adds:
        sees = None if self.sees is None else self.sees[rows]
        return Adds(self.amount, self.way, self.wants_lse, len(rows), sees, self.calls)


def test_injector_that_returns_its_input_is_identical():
    injector = Adds()
    assert same(run(injectors=(injector, Adds())), PLAIN)
    assert injector.calls == [(layer, 4) for _ in SCHEDULE for layer in range(DEPTH)]


def test_injector_that_asks_for_the_log_sum_exp_gives_the_same_picture():
    out = run(injectors=(Adds(wants_lse=True),))  # attention written out differs in the last digits
    assert all(torch.equal(a, b) for a, b in zip(out.codes, PLAIN.codes, strict=True))


@pytest.mark.parametrize("way", ["attended", "before_gate", "after_gate"])
def test_injector_acts(way):
    assert not same(run(injectors=(Adds(0.5, way),)), PLAIN)


def test_injector_follows_dropped_and_chosen_rows():
    injector = Adds()
    run(
        images=3,
        injectors=(injector,),
        guidance=ClassifierFreeGuidance([3.0, 2.0, 1.0, 1.0], len(SCHEDULE)),
        search=Picks({0: [0, 2]}),
    )
    assert [rows for layer, rows in injector.calls if layer == 0] == [6, 4, 2, 2]


def test_control_guidance_weighs_a_control_that_the_last_branch_does_not_see():
    def controlled(text: float | list[float], control: float | list[float]) -> LoopOutput:
        guidance = ControlGuidance(text, [control], len(SCHEDULE))
        sees = torch.tensor(guidance.sees_control(0)).repeat_interleave(2)
        return run(guidance=guidance, injectors=(Adds(0.5, sees=sees),))

    null = run(guidance=ClassifierFreeGuidance(0.0, len(SCHEDULE)))
    acting = run(guidance=ClassifierFreeGuidance(1.0, len(SCHEDULE)), injectors=(Adds(0.5),))
    assert same(controlled(0.0, 0.0), null)  # the branch without text and control
    assert same(controlled(1.0, 1.0), acting)  # the branch with both
    assert not same(controlled(1.0, 3.0), acting)
    falling = controlled([3.0, 3.0, 3.0, 1.0], [2.0, 2.0, 1.0, 1.0])  # three, three, two branches, one
    kept = controlled([3.0, 3.0, 3.0, 1.0 + 1e-7], [2.0, 2.0, 1.0, 1.0 + 1e-7])
    assert all(torch.equal(a, b) for a, b in zip(falling.codes, kept.codes, strict=True))


# target


def test_target_decides_what_the_next_scale_reads():
    class Deaf(ResidualTarget):
        """Every scale reads zeros."""

        def next_input(self, latent_sum: Tensor, step: ScaleStep) -> Tensor:
            return torch.zeros_like(super().next_input(latent_sum, step))

    out = run(target=Deaf(BITS, PATCH))
    assert torch.equal(out.codes[0], PLAIN.codes[0]) and not same(out, PLAIN)
