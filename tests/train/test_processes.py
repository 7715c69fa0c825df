"""Two processes that share a batch are one process: the same losses, the same controls."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_photos import save_photo_model, write_photos
from tiny_runs import TINY, curve, written

from scaleweaver.train import run
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control import ControlRecipe
from scaleweaver.train.processes import Share

SCRIPT = Path(__file__).resolve().parent.parent / "process_runs.py"


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
    """Settings of a run whose rows see one of two controls or, half of them, none; a slice may see nothing at all."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    save_photo_model(folder / "model")
    write_photos(folder / "photos", [(64, 64)] * 6 + [(40, 80)] * 4)
    controls = {"canny": {"lora_rank": 2}, "palette": {"lora_rank": 2}}
    values = TINY | {"recipe": "control", "controls": controls, "control_dropout": 0.5, "held_out": 0.2, "batch": 4}
    values |= {"model": str(folder / "model"), "data": {"photos": str(folder / "photos")}, "steps": 4, "lr": 1e-2}
    values |= {"latents": str(folder / "features"), "gradient_checkpointing": True, "val_pictures": 1}
    return values | {"out": str(folder), "validate_every": 4, "accumulate": 2}


def losses(out: Path) -> list[tuple[str, str, float]]:
    """All logged but times."""
    return [(step, name, float(value)) for step, name, value in curve(out) if name != "name"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that are started: Adam magnifies what another order of summation changes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_give_the_losses_of_one(values, one_thread):
    folder = Path(values["out"])
    run(written(folder, values), {"out": str(folder / "one")})
    (folder / "values.json").write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), str(folder / "values.json"), port],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = losses(folder / "one")
    assert len({value for _, name, value in one if name == "loss"}) == 4
    for name in ("whole", "sharded"):
        shared = losses(folder / name)
        drawn = [entry for entry in one if name == "whole" or not entry[1].startswith("val_f1")]
        assert [entry[:2] for entry in shared] == [entry[:2] for entry in drawn]
        assert [entry[2] for entry in shared] == pytest.approx([entry[2] for entry in drawn], abs=1e-5)
        for control in values["controls"]:
            for file in ("control.safetensors", "adapter_model.safetensors"):
                ours, theirs = (load_file(folder / out / "result" / control / file) for out in ("one", name))
                assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours), (name, control, file)
        facts = [json.loads((folder / name / f"process-{number}.json").read_text()) for number in (0, 1)]
        assert [fact["process"] for fact in facts] == [0, 1]
        share = sum(fact["frozen_here"] for fact in facts) / facts[0]["frozen"]
        assert share == 2 if name == "whole" else 1 <= share < 1.1  # two copies, or one between them


def test_each_process_takes_its_rows_of_the_same_batch(values, monkeypatch):
    whole = ControlRecipe(TrainConfig.from_mapping(values))
    parts = []
    for index in (0, 1):
        monkeypatch.setattr(Share, "own", classmethod(lambda cls, index=index: cls(index, 2)))
        parts.append(ControlRecipe(TrainConfig.from_mapping(values)))
    for index in range(6):
        batch, shares = whole.batch(index, 4), [part.batch(index, 4) for part in parts]
        assert [share["share"].tolist() for share in shares] == [[0, 2], [1, 2]]
        for key in ("latent", "drop", "features", "lengths", "seen.canny", "seen.palette"):
            assert torch.equal(torch.cat([share[key] for share in shares]), batch[key]), key
        for key in ("maps.canny", "maps.palette"):
            found = [share[key] for share in shares if key in share]
            assert (key in batch) == bool(found) and (not found or torch.equal(torch.cat(found), batch[key]))
        with torch.no_grad():
            means = [float(part.model(share, 7)[0]) for part, share in zip(parts, shares, strict=True)]
            assert sum(means) / 2 == pytest.approx(float(whole.model(batch, 7)[0]), abs=1e-6)


def test_captions_that_say_everything_are_those_of_one_process(tmp_path, monkeypatch):
    save_photo_model(tmp_path / "model")
    pictures = {"online": True, "split": "train", "count": 6, "size": 256, "supersample": 1}
    values = TINY | {"recipe": "control", "kind": "canny", "model": str(tmp_path / "model"), "out": str(tmp_path)}
    values |= {"data": pictures, "val_data": pictures | {"count": 1}, "adapter": {"lora_rank": 2}, "batch": 4}
    config = TrainConfig.from_mapping(values | {"explicit_captions": 0.5})
    recipes = [ControlRecipe(config)]
    for index in (0, 1):
        monkeypatch.setattr(Share, "own", classmethod(lambda cls, index=index: cls(index, 2)))
        recipes.append(ControlRecipe(config))
    for index in (0, 1):
        told = []
        for recipe in recipes:
            batch = recipe.batch(index, 4)
            told.append([ids[mask.bool()].tolist() for ids, mask in zip(batch["ids"], batch["mask"], strict=True)])
        assert told[0] == told[1] + told[2]
    with pytest.raises(ValueError, match="by_magnitude weighs bits by the mean over a whole batch"):
        ControlRecipe(TrainConfig.from_mapping(values | {"by_magnitude": True}))


def test_batches_that_cannot_be_shared_are_refused(values, monkeypatch):
    assert Share(1, 2).rows(6) == range(3, 6) and Share().rows(5) == range(5)
    monkeypatch.setattr(Share, "own", classmethod(lambda cls: cls(0, 3)))
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared evenly by 3 processes"):
        ControlRecipe(TrainConfig.from_mapping(values))
