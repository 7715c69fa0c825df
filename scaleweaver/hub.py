"""Where a model lies, built in, in a folder or on the Hugging Face Hub, and the way back to the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from scaleweaver.adapters import CONFIG_FILE, control_kind
from scaleweaver.download import download

BUILT_IN = ("toybox",)


def built_in_folder(name: str) -> Path:
    """Where a built-in model lies, if it is there."""
    return Path(__file__).parent / "assets" / name


def locate(
    model: str | os.PathLike[str],
    *,
    marker: str = "model_index.json",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a model: a built-in name, a folder, or a Hub id that is downloaded once; it must hold `marker`.

    A built-in name wins over a folder of that name in the working directory; write "./toybox" for the folder.
    """
    name = os.fspath(model)
    if name in BUILT_IN:
        folder = built_in_folder(name)
        if not (folder / marker).is_file():
            raise ValueError(
                f"the built-in model {name!r} is not part of this installation ({folder} lacks {marker});"
                ' run "pip install --force-reinstall --no-deps ." in a complete clone'
            )
        return folder
    if not os.path.isdir(name):
        folder = download(
            name,
            built_in=BUILT_IN,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    else:
        folder = Path(name)
    if marker and not (folder / marker).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{name!r} holds no {marker} (found: {found}); pass what save_pretrained wrote")
    return folder


def locate_control(
    source: str | os.PathLike[str],
    name: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str]:
    """Folder and name of a control: of `source` itself, or of one below its controls/ (`name`, or the only one)."""
    root = locate(
        source, marker="", revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    if (root / CONFIG_FILE).is_file():
        return root, control_kind(root)
    below = {file.parent.name: file.parent for file in sorted((root / "controls").glob(f"*/{CONFIG_FILE}"))}
    if name in below or (name is None and len(below) == 1):
        chosen = name or next(iter(below))
        return below[chosen], chosen
    if not below:
        raise ValueError(f"{os.fspath(source)!r} holds no {CONFIG_FILE}; pass the folder or repository of a control")
    raise ValueError(f"{os.fspath(source)!r} holds the controls {', '.join(below)}; pass one of them as name=")


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload scaleweaver model",
    create_pr: bool = False,
) -> str:
    """Put a folder into a Hub repository, made if it is not there; returns the address of the commit."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=Path(folder), commit_message=commit_message, create_pr=create_pr
    )
    return str(commit.pr_url or commit.commit_url)


def model_card(name: str, *, height: int, width: int, parameters: int, controls: Sequence[str]) -> str:
    """README.md of a saved pipeline, with the front matter by which the Hub finds it."""
    tags = ["text-to-image", "visual-autoregressive", "scaleweaver", *controls]
    call = f'    control={{"{controls[0]}": control_image}},\n' if controls else ""
    lines = [
        "---",
        "library_name: scaleweaver",
        "pipeline_tag: text-to-image",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {name}",
        "",
        f"A visual autoregressive (next-scale) text-to-image model of {parameters / 1e6:.1f}M parameters;"
        f" default size {width}x{height}; controls: {', '.join(controls) or 'none'}.",
        "",
        "```python",
        "from scaleweaver import VARControlPipeline",
        "",
        f'pipe = VARControlPipeline.from_pretrained("{name}")',
        f'out = pipe(\n    "your prompt",\n{call}    seed=7,\n)',
        'out.images[0].save("out.png")  # prompt, seed and settings are inside the file',
        "```",
        "",
        "Weights are safetensors. Fill in what the model was trained on, what it cannot do, and its licence.",
        "",
    ]
    return "\n".join(lines)
