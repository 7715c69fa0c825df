"""Training recipes on one accelerate loop: `run("recipes/toybox/tokenizer.yaml")`."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaleweaver.train.config import TrainConfig
    from scaleweaver.train.trainer import Recipe


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Runs, or resumes, the recipe of a yaml file; returns the folder of the result. `overrides` as in `read_config`.

    Raises ValueError for an unknown recipe name, and a missing or unknown setting. A file with stages is run by
    `stages.run_stages`.
    """
    from scaleweaver.train.trainer import train

    config = read_config(recipe, overrides)
    return train(make_recipe(config), config)


def make_recipe(config: TrainConfig) -> Recipe:
    """What `config.recipe` names, with its pictures rendered, its networks made or loaded and its features computed."""
    from scaleweaver.train.processes import check_setup

    check_setup(config.recipe)  # before pictures are rendered
    made: Recipe = recipe_class(config.recipe)(config)
    return made


def recipe_class(name: str) -> Any:
    """The class of a recipe: made from a config, its `option_names` are the settings that it reads."""
    from scaleweaver.train.backbone import BackboneRecipe
    from scaleweaver.train.control import ControlRecipe
    from scaleweaver.train.estimator import EstimatorRecipe
    from scaleweaver.train.judge import JudgeRecipe
    from scaleweaver.train.tokenizer import TokenizerRecipe

    recipes = {
        "tokenizer": TokenizerRecipe, "backbone": BackboneRecipe, "control": ControlRecipe, "judge": JudgeRecipe,
        "estimator": EstimatorRecipe,
    }  # fmt: skip
    if name not in recipes:
        raise ValueError(f'recipe "{name}" is unknown; expected {", ".join(recipes)}')
    return recipes[name]


def read_config(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The settings of a yaml file.

    ``overrides`` replace values of the file (`scaleweaver train FILE --set key=value`); a key with dots reaches into
    a nested setting. Raises ValueError for a missing file and one that holds no settings.
    """
    from scaleweaver.train.config import TrainConfig

    return TrainConfig.from_mapping(changed(read_settings(recipe), overrides or {}))


def is_plan(recipe: str | Path) -> bool:
    """Whether a yaml file has several stages, see `stages.read_plan`."""
    return "stages" in read_settings(recipe)


def read_settings(recipe: str | Path) -> dict[str, Any]:
    """A yaml file as it stands."""
    import yaml

    path = Path(recipe)
    if not path.is_file():
        raise ValueError(f"no training config at {path}; the repository's own are recipes/toybox/*.yaml")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected a mapping of settings")
    return values


def changed(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with some replaced; "adapter.lora_rank" is the key lora_rank of the mapping adapter."""
    result = deepcopy(dict(values))
    for key, value in overrides.items():
        *outer, name = key.split(".")
        inner: Any = result
        for part in outer:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}: {part} is {inner!r}, which has no settings of its own; set {part} as a whole")
        inner[name] = value
    return result
