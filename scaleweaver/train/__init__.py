"""Training recipes on one accelerate loop: `run("recipes/toybox/tokenizer.yaml")`."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaleweaver.train.trainer import TrainConfig


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Runs, or resumes, the recipe of a yaml file; returns the folder of the result. `overrides` as in `read_config`.

    Raises ValueError for an unknown recipe name, and a missing or unknown setting.
    """
    from scaleweaver.train.processes import check_setup
    from scaleweaver.train.trainer import train

    config = read_config(recipe, overrides)
    check_setup(config.recipe)  # before pictures are rendered
    if config.recipe == "tokenizer":
        from scaleweaver.train.tokenizer import TokenizerRecipe

        return train(TokenizerRecipe(config), config)
    if config.recipe == "backbone":
        from scaleweaver.train.backbone import BackboneRecipe

        return train(BackboneRecipe(config), config)
    if config.recipe == "control":
        from scaleweaver.train.control import ControlRecipe

        return train(ControlRecipe(config), config)
    if config.recipe == "judge":
        from scaleweaver.train.judge import JudgeRecipe

        return train(JudgeRecipe(config), config)
    if config.recipe == "estimator":
        from scaleweaver.train.estimator import EstimatorRecipe

        return train(EstimatorRecipe(config), config)
    raise ValueError(f'recipe "{config.recipe}" is unknown; expected tokenizer, backbone, control, judge or estimator')


def read_config(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The settings of a yaml file.

    ``overrides`` replace values of the file (`scaleweaver train FILE --set key=value`); a key with dots reaches into
    a nested setting. Raises ValueError for a missing file and one that holds no settings.
    """
    import yaml

    from scaleweaver.train.trainer import TrainConfig

    path = Path(recipe)
    if not path.is_file():
        raise ValueError(f"no training config at {path}; the repository's own are recipes/toybox/*.yaml")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected a mapping of settings")
    return TrainConfig.from_mapping(_changed(values, overrides or {}))


def _changed(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with some replaced; "adapter.lora_rank" is the key lora_rank of the mapping adapter."""
    changed = deepcopy(dict(values))
    for key, value in overrides.items():
        *outer, name = key.split(".")
        inner: Any = changed
        for part in outer:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}: {part} is {inner!r}, which has no settings of its own; set {part} as a whole")
        inner[name] = value
    return changed
