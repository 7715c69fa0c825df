"""The optimisers a recipe may name: AdamW in three forms, and Muon on the hidden matrices with AdamW on all else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal by Newton-Schulz
iterations; the step is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves
both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from scaleweaver.train.config import TrainConfig

OPTIMIZERS = ("adamw", "adamw_fused", "adamw_8bit", "muon")
MOMENTUM = 0.95


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """What `config.optimizer` names; "muon" takes the groups marked "hidden", which hold matrices alone."""
    values: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        return MuonAndAdamW(groups, **values)
    if config.optimizer != "adamw_8bit":
        return torch.optim.AdamW(groups, fused=config.optimizer == "adamw_fused" or None, **values)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f'optimizer adamw_8bit needs bitsandbytes ({error}); run pip install "scaleweaver[train8bit]", or set '
            "optimizer to adamw_fused"
        ) from error
    return AdamW8bit(groups, **values)


class MuonAndAdamW(torch.optim.Optimizer):
    """One optimiser of two: the groups of both are its own, so a learning rate set in them reaches the right one."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"optimizer muon came with torch 2.9 and this is {torch.__version__}; update torch, or set optimizer "
                "to adamw"
            )
        hidden = [group for group in groups if group.get("hidden")]
        others = [group for group in groups if not group.get("hidden")]
        if not hidden:
            raise ValueError("optimizer muon finds no hidden matrices in this recipe; set optimizer to adamw")
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                hidden, lr=lr, weight_decay=weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
            )
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay))
        super().__init__([p for group in groups for p in group["params"]], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon and AdamW side by side take no closure; call backward() before step()")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
