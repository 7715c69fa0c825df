"""Training in several processes: each takes its rows of the same global batch, and gradients are averaged.

A run in several processes is the run in one: batch, noise and learning rate are those of the global batch, of which
process p of n takes rows p B/n to (p + 1) B/n, and everybody takes the mean gradient. The trained weights (a control:
a few per cent of the model) are whole in every process; we average their gradients ourselves, since in a slice some of
them, or all, may have none (no row sees that control). The frozen backbone is whole in every process too, or with
`accelerate launch --use_fsdp --fsdp_version 2` it is sharded over them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    broadcast,
    get_int_from_env,
    is_tensorboard_available,
    parse_flag_from_env,
    reduce,
)
from torch import Tensor, nn

SEVERAL = ("control",)  # recipes that share a batch among processes
PATIENCE = timedelta(hours=12)  # others wait while the main process validates or fills a cache


@dataclass(frozen=True)
class Share:
    """The part of a global batch that a process works on."""

    index: int = 0
    count: int = 1

    @classmethod
    def own(cls) -> Share:
        """That of this process."""
        state = PartialState()
        return cls(state.process_index, state.num_processes)

    def rows(self, size: int) -> range:
        """Which of `size` rows of the global batch."""
        if size % self.count:
            raise ValueError(
                f"a batch of {size} cannot be shared evenly by {self.count} processes; set batch to a multiple of that"
            )
        part = size // self.count
        return range(self.index * part, (self.index + 1) * part)


@runtime_checkable
class Shardable(Protocol):
    """A recipe whose frozen weights may be spread over processes."""

    model: nn.Module

    def sharding(self) -> tuple[list[nn.Module], dict[type[nn.Module], tuple[str, ...]]]:
        """Modules to keep whole (all that trains must be among them), and what is sharded unit by unit: classes with
        their methods other than `forward` that read weights.
        """
        ...


def check_setup(recipe: str) -> None:
    """Refuses what would go wrong later, and joins the other processes of a launch."""
    # the names that accelerate reads; asking it would already wait for the other processes
    count = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if count > 1 and recipe not in SEVERAL:
        raise ValueError(
            f"training was launched as {count} processes, but the recipe {recipe} runs in one; start it with "
            "`scaleweaver train` and raise batch or accumulate"
        )
    if not is_tensorboard_available():
        raise ValueError('training writes its curves for tensorboard; run pip install "scaleweaver[train]"')
    if count > 1 and not PartialState._shared_state:
        PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the frozen weights are spread over the processes; accelerate itself knows that for GPUs only."""
    on_cpus = accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP")
    return on_cpus or accelerator.distributed_type == DistributedType.FSDP


def prepare(accelerator: Accelerator, recipe: Any, optimizer: Any, trained: Sequence[nn.Parameter]) -> tuple[Any, Any]:
    """Model and optimiser on their device, in the number format of the run, the frozen part sharded where asked."""
    recipe.model.to(accelerator.device)
    # "evaluation mode": without accelerate's own gradient averaging, see the top of this file
    model = accelerator.prepare_model(recipe.model, evaluation_mode=True)
    if is_sharded(accelerator):
        _shard(recipe, accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None)
    for parameter in trained if accelerator.num_processes > 1 else ():
        parameter.data.copy_(broadcast(parameter.data))
    return model, accelerator.prepare_optimizer(optimizer)


def _shard(recipe: Any, plugin: Any) -> None:
    """FSDP2 on the frozen weights of a recipe in place, with what `accelerate launch --fsdp_...` chose."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not isinstance(recipe, Shardable) or getattr(plugin, "fsdp_version", 2) != 2:
        raise ValueError(
            "sharded training works with FSDP2 and recipes with a frozen backbone; launch with --fsdp_version 2, or "
            "without --use_fsdp"
        )
    # nothing here writes into what a block returns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    whole, units = recipe.sharding()
    kept = {p for module in whole for p in module.parameters()}
    if not all(p in kept for p in recipe.model.parameters() if p.requires_grad):
        raise ValueError("FSDP2 shards a frozen backbone; set backbone_lr_scale to 0, or launch without --use_fsdp")
    chosen: dict[str, Any] = {"ignored_params": kept}
    if plugin is not None:
        chosen |= {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    for module in list(recipe.model.modules()):
        for unit, methods in units.items():
            if type(module) is unit:
                fully_shard(module, **chosen)
                for method in methods:
                    register_fsdp_forward_method(module, method)
    chosen.pop("reshard_after_forward", None)  # what is left at the root is needed until the step ends
    fully_shard(recipe.model, **chosen)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean over processes in place; one that had a gradient nowhere keeps none, as in a single process."""
    count = PartialState().num_processes
    if count == 1:
        return
    device = parameters[0].device
    present: Tensor = reduce(torch.tensor([float(p.grad is not None) for p in parameters], device=device), "sum")
    for parameter, processes in zip(parameters, present.tolist(), strict=True):
        if processes:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(own, "mean")


def mean(values: dict[str, float]) -> dict[str, float]:
    """Metrics averaged over processes."""
    state = PartialState()
    if state.num_processes == 1 or not values:
        return values
    merged = reduce(torch.tensor(list(values.values()), dtype=torch.float32, device=state.device), "mean")
    return dict(zip(values, merged.tolist(), strict=True))


def anyone(flag: bool) -> bool:
    """Whether it holds in some process, so that all of them do the same."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor([float(flag)], device=state.device), "sum").item())
