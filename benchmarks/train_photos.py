"""A canny control on real photos without any published weight: does it learn, fit, resume, and run in two processes?

The published 125M architecture with random weights (its text encoder cut to 2 of 24 layers, as in infinity_125m_cpu.py)
and the photographs that scikit-image ships: few, so each is cut into several pictures of different shapes. Random
weights draw nothing, and so the question is not what the pictures look like but whether the control's path learns: the
teacher-forced loss of held-out pictures with their edge maps, and without. The gates of the blocks start open
(`init_weights(gate=1, head=1)`), since nothing would come through those of a fresh model.

pip install --no-deps scikit-image
python benchmarks/train_photos.py [--threads 1]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from infinity_125m_cpu import build, tokenizer_of
from PIL import Image

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.doctor import processor
from scaleweaver.pipeline import VARControlPipeline

RESULT = Path(__file__).parent / "results" / "train_photos.json"
# photographs among scikit-image's data, and what they show; drawings, scans and silhouettes are left out
PHOTOS = {
    "astronaut.png": "an astronaut in an orange suit", "brick.png": "a wall of bricks",
    "camera.png": "a man behind a camera", "chelsea.png": "a cat looking up",
    "coffee.png": "a cup of coffee on a table", "coins.png": "old coins", "grass.png": "grass", "gravel.png": "gravel",
    "hubble_deep_field.jpg": "galaxies in a dark sky",
    "moon.png": "the surface of the moon", "motorcycle_left.png": "a motorcycle in a garage, seen from the left",
    "motorcycle_right.png": "a motorcycle in a garage, seen from the right", "page.png": "a printed page",
    "retina.jpg": "the retina of an eye", "rocket.jpg": "a rocket on a launch pad",
}  # fmt: skip
# left, top, right, bottom as parts of the photo, and how the caption ends
CUTS = {
    "": (0.0, 0.0, 1.0, 1.0), ", upper half": (0.0, 0.0, 1.0, 0.5), ", left part": (0.0, 0.0, 0.6, 1.0),
    ", lower right": (0.4, 0.4, 1.0, 1.0),
}  # fmt: skip


def write_photos(folder: Path) -> dict[str, int]:
    """An imagefolder of all cuts; says how many photos and pictures."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the photos come from scikit-image; run pip install --no-deps scikit-image")
    data = Path(found.submodule_search_locations[0]) / "data"
    folder.mkdir(parents=True)
    lines = []
    for name, text in PHOTOS.items():
        with Image.open(data / name) as opened:
            photo = opened.convert("RGB")
        for number, (ending, (left, top, right, bottom)) in enumerate(CUTS.items()):
            width, height = photo.size
            cut = photo.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
            file = f"{Path(name).stem}-{number}.png"
            cut.save(folder / file)
            lines.append(json.dumps({"file_name": file, "text": [f"a photo of {text}{ending}", f"{text}{ending}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"photos": len(PHOTOS), "pictures": len(lines)}


def write_model(folder: Path) -> None:
    """125M with random weights whose vocabulary knows the captions' words."""
    torch.manual_seed(0)
    pipe: VARControlPipeline = build()
    words = " ".join(["a photo of", *PHOTOS.values(), *CUTS])
    assert isinstance(pipe.transformer, InfinityTransformer)
    pipe.transformer.init_weights(gate=1.0, head=1.0)
    pipe.register_modules(tokenizer=tokenizer_of(words))
    pipe.save_pretrained(folder)


def settings(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    """One run's settings file, written."""
    values = {
        "recipe": "control", "kind": "canny", "model": str(folder / "model"),
        "data": {"photos": str(folder / "photos")}, "out": str(folder / out), "latents": str(folder / "features"),
        "pixels": "0.06M", "held_out": 0.1,
        "steps": 12, "batch": 2, "lr": 1e-3, "lr_schedule": "constant", "warmup": 2, "clip": 1.0, "ema": 0.0,
        "optimizer": "adamw_fused",
        "precision": "bf16", "dtype": "bfloat16", "gradient_checkpointing": True, "log_every": 1,
        "validate_every": 6, "checkpoint_every": 6, "val_rows": 4, "val_pictures": 0, "strength": 0.3,
        "control_dropout": 0.0, "adapter": {"lora_rank": 16, "z_position": "after_gate"},
    }  # fmt: skip
    return values | changes


def one_run(path: Path) -> None:
    """What a child process does: train, then the held-out loss under own and wrong maps, and its memory."""
    from scaleweaver.train import read_config
    from scaleweaver.train.control import ControlRecipe
    from scaleweaver.train.memory import estimate
    from scaleweaver.train.processes import check_setup
    from scaleweaver.train.trainer import train

    config = read_config(path)
    check_setup(config.recipe)
    recipe = ControlRecipe(config)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    train(recipe, config)
    plan = estimate(config, device="cpu", processes=recipe.share.count)
    more = plan.training - plan.frozen - plan.trained
    facts: dict[str, Any] = {
        "rss_before_training_mib": round(before),
        "peak_on_top_mib": round(resident_mib("VmHWM") - before),
        "predicted_on_top_mib": round(more / 2**20),
    }
    if recipe.share.index == 0:
        with torch.no_grad():
            rows = list(range(min(config.options["val_rows"], len(recipe.held_out))))
            maps = {row: recipe._exact_map("canny", row) for row in rows}
            other = {row: _of_same_size(maps, row) for row in rows}
            losses = {
                "without": recipe._held_out_loss(rows, {}),
                "own_map": recipe._held_out_loss(rows, {"canny": maps}),  # type: ignore[dict-item]
                "another_pictures_map": recipe._held_out_loss(rows, {"canny": other}),
            }
        facts["held_out_loss"] = {name: round(value, 5) for name, value in losses.items()}
        (Path(config.out) / "facts.json").write_text(json.dumps(facts))


def one_step(path: Path, out: Path) -> None:
    """What a child process does for the memory: one step of one shape, all that PyTorch allocates on top of weights."""
    from accelerate import Accelerator

    from scaleweaver.train import read_config
    from scaleweaver.train.control import ControlRecipe
    from scaleweaver.train.memory import estimate

    config = read_config(path)
    recipe = ControlRecipe(config)
    model = Accelerator(mixed_precision=config.precision).prepare_model(recipe.model, evaluation_mode=True)
    batch = recipe.batch(0, config.batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss, _ = model(batch, 0)
        loss.backward()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    plan = estimate(config, device="cpu")
    moment = max(plan.activations + plan.working, plan.encoding_maps) + plan.gradients
    peak = max(itertools.accumulate(size for _, size in changes))
    facts = {"allocated_mib": round(peak / 2**20), "predicted_mib": round(moment / 2**20)}
    out.write_text(json.dumps(facts))


def memory(folder: Path) -> dict[str, Any]:
    """Measured and predicted, for forms of a step of 256x256."""
    found = {}
    forms: dict[str, dict[str, Any]] = {
        "bf16, checkpointing, batch 2": {}, "bf16, checkpointing, batch 4": {"batch": 4},
        "bf16, batch 2": {"gradient_checkpointing": False},
        "float32, batch 2": {"gradient_checkpointing": False, "precision": "no", "dtype": "float32"},
    }  # fmt: skip
    for name, changes in forms.items():
        path, out = folder / "step.yaml", folder / "step.json"
        step = settings(folder, "step", **changes, ratios=["1.0"], latent_cache=False)
        path.write_text(json.dumps(step), encoding="utf-8")
        subprocess.run([sys.executable, __file__, "--settings", str(path), "--step", str(out)], check=True)
        found[name] = json.loads(out.read_text())
    return found


def _of_same_size(maps: Mapping[int, Any], row: int) -> Any:
    """The map of the next row, cut or padded with nothing to this one's size."""
    import numpy as np

    wrong, size = maps[(row + 1) % len(maps)], maps[row].shape
    made = np.zeros(size, np.uint8)
    height, width = (min(a, b) for a, b in zip(wrong.shape[:2], size[:2], strict=True))
    made[:height, :width] = wrong[:height, :width]
    return made


def resident_mib(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def start(folder: Path, values: Mapping[str, Any], processes: int = 1) -> subprocess.Popen[bytes]:
    """A child that runs these settings."""
    path = folder / f"{Path(values['out']).name}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is yaml
    command = [sys.executable, __file__, "--settings", str(path)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29540"]
        command = [sys.executable, *launcher, *command[1:]]
    return subprocess.Popen(command)


def finished(folder: Path, values: Mapping[str, Any], processes: int = 1) -> dict[str, Any]:
    """Facts of a run that goes to its end."""
    if start(folder, values, processes).wait():
        raise SystemExit(f"the run {values['out']} failed")
    facts: dict[str, Any] = json.loads((Path(values["out"]) / "facts.json").read_text())
    return facts


def curve(out: str, metric: str = "loss") -> dict[int, float]:
    with (Path(out) / "metrics.csv").open(newline="") as file:
        return {int(step): float(value) for step, name, value in list(csv.reader(file))[1:] if name == metric}


def killed(folder: Path, values: Mapping[str, Any], after: int) -> int:
    """SIGKILL once so many steps are logged; returns how many were."""
    child = start(folder, values)
    log = Path(values["out"]) / "metrics.csv"
    while child.poll() is None and (not log.is_file() or max(curve(values["out"]), default=0) < after):
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return max(curve(values["out"]), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure that part alone, keep the other results")
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("PHOTO_THREADS", arguments.threads)))
    if arguments.step is not None:
        one_step(arguments.settings, arguments.step)
        return
    if arguments.settings is not None:
        one_run(arguments.settings)
        return
    os.environ["PHOTO_THREADS"] = str(arguments.threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_photos(folder / "photos")
        write_model(folder / "model")
        if arguments.memory:
            result = json.loads(RESULT.read_text(encoding="utf-8")) | {"memory_of_a_step": memory(folder)}
            RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(result["memory_of_a_step"], indent=2))
            return

        straight = settings(folder, "straight")
        facts = finished(folder, straight)
        interrupted = settings(folder, "interrupted", steps=6, validate_every=100, checkpoint_every=3, val_rows=2)
        steps_done = killed(folder, interrupted, after=4)
        finished(folder, interrupted)
        whole = settings(folder, "shared", steps=2, validate_every=100, val_rows=2)
        finished(folder, whole, processes=2)
        plain = finished(folder, settings(folder, "plain", steps=2, gradient_checkpointing=False, val_rows=2))
        built_in = {
            "model": "toybox", "latents": str(folder / "toybox-features"), "steps": 120, "batch": 8, "ema": 0.9,
            "precision": "no", "dtype": "float32", "gradient_checkpointing": False, "validate_every": 60,
            "checkpoint_every": 60, "control_dropout": 0.1, "z_lr_scale": 1.0, "strength": 0.2,
        }  # fmt: skip
        toybox = settings(folder, "toybox", **built_in)
        toybox.pop("pixels")
        toybox["adapter"] = {"lora_rank": 16, "z_position": "after_gate", "locality": 3.0}
        on_toybox = finished(folder, toybox)

        losses, resumed, shared = curve(straight["out"]), curve(interrupted["out"]), curve(whole["out"])
        result = {
            "command": " ".join(["python", *sys.argv]),
            "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
            "versions": {name: version(name) for name in ("scaleweaver", "torch", "transformers", "accelerate")},
            "threads": arguments.threads, "seconds": round(time.perf_counter() - started),
            "data": {**data, "from": f"scikit-image {version('scikit-image')}"},
            "random_125m": {
                "settings": {k: straight[k] for k in ("steps", "batch", "lr", "precision", "dtype", "adapter")},
                "loss": losses, "held_out": {
                    metric: curve(straight["out"], f"val_{metric}") for metric in ("loss_without", "loss_canny")
                },
                "at_the_end": facts["held_out_loss"],
                "process_with_checkpointing": {k: v for k, v in facts.items() if k.endswith("mib")},
                "process_without_checkpointing": {k: v for k, v in plain.items() if k.endswith("mib")},
            },
            "memory_of_a_step": memory(folder),
            "killed_and_resumed": {
                "killed_after_step": steps_done, "loss": resumed,
                "largest_difference": max(abs(resumed[s] - losses[s]) for s in resumed),
            },
            "two_processes": {
                "loss": shared, "largest_difference": max(abs(shared[s] - losses[s]) for s in shared),
            },
            "built_in_model": {
                "settings": {k: toybox[k] for k in ("steps", "batch", "lr", "adapter")},
                "held_out": {
                    metric: curve(toybox["out"], f"val_{metric}") for metric in ("loss_without", "loss_canny")
                },
                "at_the_end": on_toybox["held_out_loss"],
            },
        }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
