"""The reference bank and the injector: numbers against the formula, rows, masks, windows, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_schedule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scaleweaver.contracts import Injector
from scaleweaver.kernels.attention import attend
from scaleweaver.methods.scaleweaver import ControlAdapter, ScaleWeaverConfig
from scaleweaver.reference import ReferenceBank, ReferenceInjector, active, scale_indices, strengths, token_mask
from scaleweaver.schedule import ScaleSchedule

SCHEDULE = tiny_schedule()
H, D = 2, 8
ON = (1.0,) * len(SCHEDULE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank(rows: int = 1, schedule: ScaleSchedule = SCHEDULE) -> ReferenceBank:
    shape = (rows, H, schedule.length, D)
    return ReferenceBank({0: normal(*shape, seed=1)}, {0: normal(*shape, seed=2)}, schedule)


def reader(**config: object) -> ControlAdapter:
    """An adapter whose Z is the identity, so that results can be written down."""
    adapter = ControlAdapter(ScaleWeaverConfig(kind="canny", **config), depth=2, width=H * D, bits=4)
    for layer in adapter.z.values():
        nn.init.eye_(layer.weight)
    return adapter.requires_grad_(False)


def flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (R, L, C)


@pytest.mark.parametrize("scope", ["same", "causal"])
@pytest.mark.parametrize("first", [0, 2])
def test_joint_is_one_softmax_over_both_key_sets(scope: str, first: int) -> None:
    steps, own = SCHEDULE.steps[first:], bank()
    tokens = sum(step.n for step in steps)
    q, k, v = (normal(2, H, tokens, D, seed=seed) for seed in (3, 4, 5))
    attended, lse = attend(q, k, v, return_lse=True)
    joint = ReferenceInjector(own, reader(fusion="joint", scope=scope), ON)
    assert joint.needs_lse(0) and not joint.needs_lse(1) and isinstance(joint, Injector)
    result = joint.inject(0, steps, q, attended, lse)
    assert result.before_gate is None and result.after_gate is None
    for step in steps:  # each scale alone, without masks
        rows = slice(step.start - steps[0].start, step.stop - steps[0].start)
        seen = slice(step.start if scope == "same" else 0, step.stop)
        keys = torch.cat([k, own.keys[0][:, :, seen].expand(2, -1, -1, -1)], dim=2)
        values = torch.cat([v, own.values[0][:, :, seen].expand(2, -1, -1, -1)], dim=2)
        weights = (q[:, :, rows].double() @ keys.double().transpose(-2, -1)).softmax(-1)
        expected = (weights @ values.double()).float()
        torch.testing.assert_close(result.attended[:, :, rows], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["before_gate", "after_gate"])
@pytest.mark.parametrize("scope", ["same", "causal"])
def test_separate_is_its_own_softmax(scope: str, position: str) -> None:
    own, step = bank(2), SCHEDULE.steps[2]
    q, attended = normal(2, H, step.n, D, seed=3), normal(2, H, step.n, D, seed=4)
    injector = ReferenceInjector(own, reader(scope=scope, z_position=position), (0.0, 1.0, 0.5, 1.0))
    result = injector.inject(0, (step,), q, attended, None)
    seen = slice(step.start if scope == "same" else 0, step.stop)
    out, _ = attend(q, own.keys[0][:, :, seen], own.values[0][:, :, seen])
    assert torch.equal(result.attended, attended)
    branch, none = (result[1], result[2]) if position == "before_gate" else (result[2], result[1])
    assert none is None
    torch.testing.assert_close(branch, 0.5 * flat(out), atol=1e-6, rtol=0)


def test_nothing_happens_where_nothing_should() -> None:
    step = SCHEDULE.steps[1]
    q, attended = normal(1, H, step.n, D), normal(1, H, step.n, D)
    injector = ReferenceInjector(bank(), reader(), (1.0, 0.0, 1.0, 1.0))
    assert injector.inject(1, (step,), q, attended, None) == (attended, None, None, None)  # no such layer in the bank
    assert injector.inject(0, (step,), q, attended, None) == (attended, None, None, None)  # off at this scale
    assert not ReferenceInjector(bank(), reader(fusion="joint"), (0.0,) * 4).needs_lse(0)
    with pytest.raises(ValueError, match="log-sum-exp"):
        ReferenceInjector(bank(), reader(fusion="joint"), ON).inject(0, (step,), q, attended, None)


def test_rows() -> None:
    step, own = SCHEDULE.steps[1], bank(2)
    q, attended = normal(4, H, step.n, D), normal(4, H, step.n, D)
    expected = torch.cat([flat(attend(q[i : i + 1], *one(own, i % 2, step))[0]) for i in range(4)])
    injector = ReferenceInjector(own, reader(), ON, (True, True))  # rows: branch 0 of images 0, 1, then branch 1
    got = injector.inject(0, (step,), q, attended, None).before_gate
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    rows = torch.tensor([3, 0, 0])
    chosen = injector.select_rows(rows)
    assert chosen.bank is own
    got = chosen.inject(0, (step,), q[rows], attended[rows], None).before_gate
    torch.testing.assert_close(got, expected[rows], atol=1e-6, rtol=0)
    got = chosen.select_rows(torch.tensor([0])).inject(0, (step,), q[3:], attended[3:], None).before_gate
    torch.testing.assert_close(got, expected[3:], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="prepared for 4 rows but the call has 3"):
        injector.inject(0, (step,), q[:3], attended[:3], None)


class BankReads(TorchDispatchMode):
    """Operations that put numbers of a bank into new memory, attention aside."""

    def __init__(self, own: ReferenceBank) -> None:
        super().__init__()
        self.storages = {x.untyped_storage().data_ptr() for part in (own.keys, own.values) for x in part.values()}
        self.copies: list[str] = []
        self.attended = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and self.of_bank(x) for x in args):
            if "attention" in func.__name__ or "bmm" in func.__name__:
                self.attended += 1
            elif isinstance(result, Tensor) and not self.of_bank(result):
                self.copies.append(func.__name__)
        return result

    def of_bank(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.storages


@pytest.mark.parametrize("fusion", ["separate", "joint"])
@pytest.mark.parametrize("scales", [slice(2, 3), slice(0, 4)])
@pytest.mark.parametrize("bank_rows", [1, 2])
def test_branches_share_keys_and_values_without_a_copy(fusion: str, scales: slice, bank_rows: int) -> None:
    steps, own = SCHEDULE.steps[scales], bank(bank_rows)
    tokens = sum(step.n for step in steps)
    q, attended, lse = normal(6, H, tokens, D), normal(6, H, tokens, D), normal(6, H, tokens)
    sees = (True, True, False)
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    injector = ReferenceInjector(own, reader(fusion=fusion), ON, sees, mask, images=2)
    with BankReads(own) as reads:
        shared = injector.inject(0, steps, q, attended, lse)
        survivors = injector.select_rows(torch.tensor([1, 3, 5])).inject(
            0, steps, q[[1, 3, 5]], attended[[1, 3, 5]], lse[[1, 3, 5]]
        )
    assert reads.attended > 0 and not reads.copies
    each = ReferenceInjector(own.select_rows(torch.tensor([0, 1] * 3)), reader(fusion=fusion), ON, sees, mask, images=2)
    result = each.inject(0, steps, q, attended, lse)
    for got, left, want in zip(shared, survivors, result, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert torch.equal(got, want) and torch.equal(left, want[[1, 3, 5]])


def one(own: ReferenceBank, row: int, step: object) -> tuple[Tensor, Tensor]:
    seen = slice(step.start, step.stop)  # type: ignore[attr-defined]
    return own.keys[0][row : row + 1, :, seen], own.values[0][row : row + 1, :, seen]


@pytest.mark.parametrize("bank_rows", [1, 2, 6])
def test_blind_branch_receives_exactly_nothing(bank_rows: int) -> None:
    step = SCHEDULE.steps[1]
    q, attended = normal(6, H, step.n, D), normal(6, H, step.n, D)
    sees = (True, True, False)
    mask = torch.stack([torch.ones(1, 8, 8), torch.zeros(1, 8, 8)])  # image 1 is masked out
    injector = ReferenceInjector(bank(bank_rows), reader(), ON, sees, mask, images=2)
    branch = injector.inject(0, (step,), q, attended, None).before_gate
    nonzero = branch.abs().amax((1, 2)) > 0
    assert nonzero.tolist() == [True, False, True, False, False, False]
    everybody = ReferenceInjector(bank(bank_rows), reader(), ON, (True, True, True), images=2)
    full = everybody.inject(0, (step,), q, attended, None).before_gate
    torch.testing.assert_close(branch[[0, 2]], full[[0, 2]], atol=1e-6, rtol=0)
    left = injector.select_rows(torch.arange(4))  # the blind branch was dropped
    assert left.seen is None
    got = left.inject(0, (step,), q[:4], attended[:4], None).before_gate
    torch.testing.assert_close(got, branch[:4], atol=1e-6, rtol=0)
    if bank_rows == 1:
        with pytest.raises(ValueError, match="pass images="):
            ReferenceInjector(bank(), reader(), ON, sees)
    with pytest.raises(ValueError, match="encoded controls and 1 masks for 5 images"):
        ReferenceInjector(bank(2), reader(), ON, sees, images=5)


@pytest.mark.parametrize("bank_rows", [1, 2])
def test_rows_that_are_all_blind_still_lead_back_to_the_condition(bank_rows: int) -> None:
    """Processes that share a batch wait for one another in the backward pass, also for one whose rows see nothing."""
    own = bank(bank_rows)
    for x in (own.keys[0], own.values[0]):
        x.requires_grad_()
    steps = SCHEDULE.steps
    q, attended = (normal(2, H, SCHEDULE.length, D, seed=seed) for seed in (3, 4))
    injector = ReferenceInjector(own, reader(), ON, (False,), images=2)
    branch = injector.inject(0, steps, q, attended, None).before_gate
    assert branch is not None and branch.abs().max() == 0
    branch.sum().backward()
    assert own.keys[0].grad is not None and own.keys[0].grad.abs().max() == 0
    with torch.no_grad():
        assert injector.inject(0, steps, q, attended, None).before_gate is None


def test_mask_is_averaged_over_each_token() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :12] = 1  # one and a half of four columns
    weights = token_mask(mask, SCHEDULE)
    assert weights.shape == (1, SCHEDULE.length)
    assert weights[0, 0] == pytest.approx(12 / 32)
    finest = weights[0, SCHEDULE.steps[3].start :].view(4, 4)
    torch.testing.assert_close(finest, torch.tensor([1, 0.5, 0, 0]).expand(4, 4))
    step = SCHEDULE.steps[3]
    q, attended = normal(1, H, step.n, D), normal(1, H, step.n, D)
    masked = ReferenceInjector(bank(), reader(), ON, mask=mask).inject(0, (step,), q, attended, None).before_gate
    plain = ReferenceInjector(bank(), reader(), ON).inject(0, (step,), q, attended, None).before_gate
    torch.testing.assert_close(masked, plain * finest.flatten()[:, None])
    out, lse = attend(q, q, q, return_lse=True)
    joint = ReferenceInjector(bank(), reader(fusion="joint"), ON, mask=mask).inject(0, (step,), q, out, lse).attended
    outside = finest.flatten() == 0
    assert torch.equal(joint[:, :, outside], out[:, :, outside])
    assert (joint - out)[:, :, ~outside].abs().amin((1, 3)).min() > 0
    with pytest.raises(ValueError, match="control mask of shape"):
        token_mask(mask[0], SCHEDULE)


def test_joint_gradients_stay_finite_where_the_mask_is_zero() -> None:
    step, mask = SCHEDULE.steps[3], torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    own = bank()
    own.values[0].requires_grad_()
    own.keys[0].requires_grad_()
    q = normal(1, H, step.n, D).requires_grad_()
    out, lse = attend(q, q, q, return_lse=True)
    ReferenceInjector(own, reader(fusion="joint"), ON, mask=mask).inject(
        0, (step,), q, out, lse
    ).attended.sum().backward()
    for leaf in (q, own.keys[0], own.values[0]):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0


def test_bank() -> None:
    single, several = bank(1), bank(3)
    assert single.nbytes() == 2 * H * SCHEDULE.length * D * 4 and several.nbytes() == 3 * single.nbytes()
    assert single.select_rows(torch.tensor([0, 0, 0])) is single
    chosen = several.select_rows(torch.tensor([2, 2]))
    assert chosen.rows == 2 and torch.equal(chosen.values[0][1], several.values[0][2])
    k, _ = single.read(0, SCHEDULE.steps[1:3], "same")
    assert k.shape[2] == 4 + 9 and k.data_ptr() == single.keys[0][:, :, 1:].data_ptr()
    assert single.read(0, SCHEDULE.steps[1:3], "causal")[0].shape[2] == 1 + 4 + 9
    joined = ReferenceBank.join([several, single])
    assert joined.rows == 4 and torch.equal(joined.keys[0][3:], single.keys[0]) and joined.schedule is SCHEDULE


def test_bank_of_another_size_is_refused() -> None:
    other = ScaleSchedule(((1, 1), (2, 3)), (2, 3), stride=8)
    step = other.steps[1]
    injector = ReferenceInjector(bank(), reader(), ON)
    with pytest.raises(ValueError, match=r"scale 1 is \(2, 2\), not \(2, 3\)"):
        injector.inject(0, (step,), normal(1, H, 6, D), normal(1, H, 6, D), None)
    short = ReferenceInjector(bank(), reader(), (1.0, 1.0))  # a run over the first scales only
    step = SCHEDULE.truncate(2).steps[1]
    assert short.inject(0, (step,), normal(1, H, 4, D), normal(1, H, 4, D), None).before_gate is not None


def test_scales_by_index() -> None:
    assert (
        scale_indices(slice(2, None), 5)
        == scale_indices(range(2, 5), 5)
        == scale_indices([4, 2, 3, -1], 5)
        == (2, 3, 4)
    )
    assert scale_indices(slice(None, None, -2), 5) == (0, 2, 4) and scale_indices([], 5) == ()
    assert scale_indices(np.array([1, 0]), 5) == (0, 1)  # type: ignore[arg-type]
    wrongs: list[Any] = [[5], [-6], ["1"], [1.5], 3, "2:4"]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="pass a slice, a range or a list of indices from 0 to 4"):
            scale_indices(wrong, 5)


def test_window_follows_diffusers() -> None:
    def on(start: float, end: float, scales: int = 13) -> list[int]:
        return [index for index in range(scales) if active(index, scales, start, end)]

    assert on(0.0, 1.0) == list(range(13))
    assert on(0.0, 0.5) == list(range(6))
    assert on(0.5, 1.0) == list(range(7, 13))
    assert on(0.25, 0.75, 4) == [1, 2]
    assert on(0.3, 0.35) == []
    assert strengths(0.8, 4, end=0.5) == (0.8, 0.8, 0, 0)
    assert strengths([1, 0.5, 0.25, 0], 4, start=0.25) == (0, 0.5, 0.25, 0)
    for single in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        assert strengths(single, 4) == (0.5,) * 4  # type: ignore[arg-type]
    assert strengths(np.array([1, 0.5, 0, 2]), 4) == (1, 0.5, 0, 2)  # type: ignore[arg-type]
    assert strengths(0.8, 4, end=0.75, among=(1, 3)) == (0, 0.8, 0, 0)
    wrongs: list[dict[str, Any]] = [
        {"scale": [1, 1]}, {"scale": -1}, {"scale": [1, float("nan"), 1, 1]}, {"scale": float("inf")}, {"scale": None},
        {"scale": 1, "start": 0.6, "end": 0.5}, {"scale": 1, "end": 1.5}, {"scale": 1, "start": float("nan")},
    ]  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(ValueError, match="control"):
            strengths(**{"scales": 4, **wrong})
