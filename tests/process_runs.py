"""Run by several processes at once: the settings of a file, with whole and with sharded frozen weights.

torchrun process_runs.py FILE PORT, where PORT is free: a finished training leaves its group, the next makes a new one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control import ControlRecipe
from scaleweaver.train.processes import check_setup
from scaleweaver.train.trainer import train


def main(values: dict[str, Any], port: str) -> None:
    for name in ("whole", "sharded"):
        os.environ["ACCELERATE_USE_FSDP"] = str(name == "sharded").lower()  # as `accelerate launch --use_fsdp` sets it
        config = TrainConfig.from_mapping(values | {"out": str(Path(values["out"]) / name)})
        check_setup(config.recipe)
        recipe = ControlRecipe(config)
        weights = list(recipe.pipe.transformer.parameters())
        before = sum(p.numel() for p in weights if not p.requires_grad)
        train(recipe, config)
        if name == "sharded":
            recipe.model.reshard()  # what a step leaves gathered
        frozen = [p for p in recipe.pipe.transformer.parameters() if not p.requires_grad]
        here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in frozen)
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        facts = {"process": recipe.share.index, "frozen": before, "frozen_here": here}
        (Path(config.out) / f"process-{recipe.share.index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
