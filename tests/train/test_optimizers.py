"""Muon beside AdamW: the step of each by its definition, one state, and runs that resume."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import pytest
import torch
from noisy_run import Kill, Noisy, assert_same_run, config
from tiny_runs import NEEDS_MUON
from torch import nn

from scaleweaver.train.optimizers import MOMENTUM, MuonAndAdamW
from scaleweaver.train.trainer import train


class Hidden(Noisy):
    """The noisy recipe with its first matrix for Muon."""

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        first, second = self.model.first, self.model.second
        yield {"params": [first.weight], "hidden": True, "lr_scale": 0.5}
        yield {"params": [first.bias, *second.parameters()]}


def gradients(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    """Parameters of zero with a random gradient."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def make(hidden: list[nn.Parameter], others: list[nn.Parameter]) -> MuonAndAdamW:
    groups = [{"params": hidden, "hidden": True}, {"params": others}]
    return MuonAndAdamW(groups, lr=0.1, betas=(0.9, 0.97), weight_decay=0.0)


@NEEDS_MUON
def test_the_step_of_a_matrix_is_orthogonal_and_as_large_as_one_of_adamw():
    matrix, vector = gradients((24, 64), (5,))
    make([matrix], [vector]).step()
    left, values, right = torch.linalg.svd(matrix.grad, full_matrices=False)
    step = matrix.detach() / (-0.1 * 0.2 * 64**0.5)  # the scaling of arXiv 2502.16982, equation 4
    # five iterations bring every singular value near 1 and keep the directions
    found = left.T @ step @ right.T  # (24, 24)
    assert found.diagonal().min() > 0.6 and found.diagonal().max() < 1.3
    assert (found - found.diagonal().diag()).abs().max() < 0.05
    assert values.max() / values.min() > 2
    assert 0.1 < matrix.detach().square().mean().sqrt() / 0.1 < 0.3  # AdamW's steps are about 0.2 to 0.4 times lr


@NEEDS_MUON
def test_all_else_is_adamw():
    matrix, vector, table = gradients((8, 8), (5,), (3, 4))
    alone = [nn.Parameter(torch.zeros_like(p)) for p in (vector, table)]
    adamw = torch.optim.AdamW(alone, lr=0.1, betas=(0.9, 0.97), weight_decay=0.0)
    both = make([matrix], [vector, table])
    for _ in range(3):
        for own, other in zip((vector, table), alone, strict=True):
            other.grad = own.grad.clone()
        both.step()
        adamw.step()
    assert torch.equal(vector, alone[0]) and torch.equal(table, alone[1])


@NEEDS_MUON
def test_a_learning_rate_reaches_its_part_and_so_does_a_saved_state():
    matrix, vector = gradients((8, 8), (5,))
    optimizer = make([matrix], [vector])
    optimizer.step()
    state = deepcopy(optimizer.state_dict())
    again_matrix, again_vector = (nn.Parameter(p.detach().clone()) for p in (matrix, vector))
    again_matrix.grad, again_vector.grad = matrix.grad, vector.grad
    again = make([again_matrix], [again_vector])
    again.load_state_dict(state)
    for each in (optimizer, again):
        for group in each.param_groups:
            group["lr"] = 0.01 if group.get("hidden") else 0.0
        each.step()
    assert torch.equal(matrix, again_matrix) and torch.equal(vector, again_vector)
    momentum = next(iter(optimizer.parts[0].state.values()))["momentum_buffer"]
    # the same gradient twice, averaged with weight 1 - MOMENTUM
    torch.testing.assert_close(momentum, matrix.grad * (1 - MOMENTUM**2))


@NEEDS_MUON
def test_a_killed_run_goes_on_with_muon(tmp_path):
    train(Hidden(), config(tmp_path / "straight", optimizer="muon"))
    with pytest.raises(Kill):
        train(Hidden(kill=9), config(tmp_path / "killed", optimizer="muon"))
    train(Hidden(), config(tmp_path / "killed", optimizer="muon"))
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    train(Hidden(), config(tmp_path / "adamw"))  # the mark means nothing to AdamW
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "adamw", tmp_path / "straight")


@NEEDS_MUON
def test_what_muon_cannot_do_is_said(tmp_path):
    with pytest.raises(ValueError, match="finds no hidden matrices in this recipe; set optimizer to adamw"):
        train(Noisy(), config(tmp_path, optimizer="muon"))
    optimizer = make(*([p] for p in gradients((8, 8), (5,))))
    with pytest.raises(ValueError, match="take no closure"):
        optimizer.step(lambda: 0.0)


def test_a_torch_without_muon_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"came with torch 2\.9 and this is"):
        train(Hidden(), config(tmp_path, optimizer="muon"))


@NEEDS_MUON
def test_another_optimizer_is_refused_in_a_run_that_has_begun(tmp_path):
    train(Hidden(), config(tmp_path, minutes=0))
    before = (tmp_path / "checkpoints/0000001/state.pt").read_bytes()
    with pytest.raises(ValueError, match=r"state\.pt was written with adamw, this run uses muon; set optimizer back"):
        train(Hidden(), config(tmp_path, optimizer="muon"))
    assert (tmp_path / "checkpoints/0000001/state.pt").read_bytes() == before
    train(Hidden(), config(tmp_path))
    train(Hidden(), config(tmp_path / "straight"))
    assert_same_run(tmp_path, tmp_path / "straight")
