"""The predicted memory is what networks really keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_photos import save_photo_model, write_photos
from tiny_runs import TINY

from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control import ControlRecipe
from scaleweaver.train.memory import MemoryPlan, estimate


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
    """A model wide enough that its states outweigh the small change."""
    folder = tmp_path_factory.mktemp("memory")
    torch.manual_seed(0)
    save_photo_model(folder / "model", width=128, depth=4, heads=4)
    write_photos(folder / "photos", [(64, 64)] * 4)
    values = TINY | {"recipe": "control", "kind": "canny", "model": str(folder / "model"), "out": str(folder / "run")}
    values |= {"data": {"photos": str(folder / "photos")}, "held_out": 0.25, "ratios": ["1.0"], "control_dropout": 0.0}
    return values | {"latents": str(folder / "features"), "adapter": {"lora_rank": 4, "inject_blocks": [0, 1, 2]}}


def kept(recipe: ControlRecipe, batch: Any) -> int:
    """Bytes that a forward pass leaves for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in recipe.model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = recipe.model(batch, 0)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_kept_for_the_backward_pass(values, checkpointing, precision):
    dtype = {"no": "float32", "bf16": "bfloat16"}[precision]
    more = {"gradient_checkpointing": checkpointing, "dtype": dtype, "precision": precision}
    config = TrainConfig.from_mapping(values | more)
    recipe = ControlRecipe(config)
    AcceleratorState._reset_state()
    Accelerator(mixed_precision=precision).prepare_model(recipe.model, evaluation_mode=True)
    batch = recipe.batch(0, 2)
    measured = kept(recipe, batch)
    if checkpointing:  # the injectors hold the bank, outside of what autograd keeps
        size = {"no": 4, "bf16": 2}[precision]
        measured += 3 * 2 * size * 2 * 521 * 128  # blocks, keys and values, rows, tokens, width
    plan = estimate(config, device="cpu")
    assert plan.tokens == 521
    assert plan.activations == pytest.approx(measured, rel=0.12)
    AcceleratorState._reset_state()


def test_weights_and_optimizer_are_counted_exactly(values):
    for dtype in ("float32", "bfloat16"):
        config = TrainConfig.from_mapping(values | {"dtype": dtype})
        recipe = ControlRecipe(config)
        plan = estimate(config)
        weights = list(recipe.model.parameters())
        assert plan.trained == sum(p.nbytes for p in weights if p.requires_grad) == plan.gradients == plan.averages
        assert plan.frozen == sum(p.nbytes for p in weights if not p.requires_grad)
        optimizer = torch.optim.AdamW([p for p in weights if p.requires_grad])
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = [x for state in optimizer.state.values() for name, x in state.items() if name.startswith("exp")]
        assert plan.optimizer == sum(x.nbytes for x in moments)


def change(values: dict[str, Any], **more: Any) -> MemoryPlan:
    return estimate(TrainConfig.from_mapping(values | more))


def test_settings_that_save_memory_do(values, tmp_path):
    base = change(values, optimizer="adamw")
    assert change(values, gradient_checkpointing=True).training < base.training
    assert change(values, optimizer="adamw_8bit").optimizer < base.optimizer / 3
    assert change(values, optimizer="adamw_fused").optimizer_step == 0 < base.optimizer_step
    assert change(values, dtype="bfloat16", precision="bf16").frozen < 0.6 * base.frozen
    assert change(values, batch=1).activations * 1.7 < base.activations  # masks serve all rows
    assert change(values, val_pictures=0).drawing == 0 < base.drawing
    assert change(values, ratios=None).tokens > base.tokens
    two = {"canny": {"lora_rank": 4}, "palette": {"lora_rank": 4}}
    without = {key: value for key, value in values.items() if key not in ("kind", "adapter")}
    assert change(without, controls=two).trained > 1.5 * change(without, controls={"canny": {"lora_rank": 4}}).trained
    half = estimate(TrainConfig.from_mapping(values), processes=2)
    assert half.activations * 1.7 < base.activations and half.frozen == base.frozen
    assert dict(base.rows())["peak of training"] == base.training <= base.peak


def test_a_published_model_that_is_not_there_yet(values, tmp_path):
    absent = values | {"model": str(tmp_path / "none"), "architecture": "125M", "dtype": "bfloat16", "pixels": "0.06M"}
    plan = change(absent)
    assert 0.25e9 < plan.frozen < 0.6e9 and 2.4e9 < plan.encoding_texts < 2.5e9  # flan-t5-xl's encoder in 2 bytes
    with pytest.raises(ValueError, match=r"architecture is None; pass --model FOLDER, or set architecture to one of"):
        change(values, model=str(tmp_path / "none"))
    for wrong in ({"recipe": "judge"}, {"backbone_lr_scale": 1.0}):
        with pytest.raises(ValueError, match="recipe control with a frozen backbone"):
            change(values, **wrong)


def test_the_plan_for_24_gigabytes_holds():
    from scaleweaver.train import read_config

    recipes = Path(__file__).resolve().parents[2] / "recipes"
    plan = estimate(read_config(recipes / "infinity_2b_canny.yaml", {"model": "absent"}))
    assert plan.peak < 24 * 2**30 and plan.tokens > 2500
