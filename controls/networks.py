"""Networks of preprocessors, from a folder or from the Hub through transformers, and the device that they run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from scaleweaver.controls.base import Pixels

if TYPE_CHECKING:
    import torch


def choose_device(device: str) -> torch.device:
    """A device of this machine by its name; "auto" is the GPU where there is one, else the CPU."""
    import torch

    gpus, apple = torch.cuda.device_count() * torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if gpus else "mps" if apple else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r}; pass auto, cpu, cuda, cuda:1 or mps") from None
    if (chosen.type == "cuda" and (chosen.index or 0) >= gpus) or (chosen.type == "mps" and not apple):
        found = [f"cuda:{i}" for i in range(gpus)] + ["mps"] * apple
        raise ValueError(f"device={device!r} is not on this machine; pass {' or '.join(['auto', 'cpu', *found])}")
    return chosen


def locate_network(model: str, *, built_in: tuple[str, ...], instead: str) -> tuple[Path, dict[str, Any]]:
    """Folder and configuration of a network: the folder `model`, or a Hub id that is downloaded once."""
    from scaleweaver.download import download

    folder = Path(model) if Path(model).is_dir() else download(model, built_in=built_in, instead=instead)
    file = folder / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{model!r} holds no config.json (found: {found}); pass what save_pretrained wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); download it again") from None
    return folder, config


def load_network(model: str, folder: Path, network_class: Any, device: str) -> tuple[Any, Any]:
    """(image processor, network in evaluation mode) of a folder, by one of transformers' Auto classes."""
    from transformers import AutoImageProcessor

    target = choose_device(device)
    try:
        # without torchvision transformers takes the processors that work on PIL and numpy
        processor = AutoImageProcessor.from_pretrained(folder)
        network = network_class.from_pretrained(folder, use_safetensors=True)
    except ImportError as error:  # some families need a package that is not among our requirements
        raise ValueError(f"{model!r} cannot be loaded: {' '.join(str(error).split())}") from error
    except (ValueError, OSError, KeyError) as error:
        task = network_class.__name__.removeprefix("AutoModelFor")
        raise ValueError(
            f"{model!r} cannot be loaded for {task} ({str(error).strip().splitlines()[0]}); pass a network of that task"
            " with its preprocessor_config.json and weights as safetensors"
        ) from error
    return processor, network.eval().to(target)


def answer(model: str, processor: Any, network: Any, picture: Pixels) -> Any:
    """What a network of transformers says of a picture (H, W, 3)."""
    import torch

    try:
        inputs = processor(images=Image.fromarray(picture), return_tensors="pt", input_data_format="channels_last")
    except ValueError as error:
        height, width = picture.shape[:2]
        raise ValueError(
            f"{model!r} cannot read a picture of {width}x{height} ({error}); cut it to a shape that is less long"
        ) from error
    with torch.inference_mode():
        return network(**inputs.to(network.device))
