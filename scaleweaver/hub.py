"""Where a model lies, built in, in a folder or on the Hugging Face Hub, and the way back to the Hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id

from scaleweaver.cards import CONTROL_FILE, MODEL_FILE, Card, write_card
from scaleweaver.download import download

BUILT_IN = ("toybox",)
_OF_A_CARD = ("README.md", "images")


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
    from scaleweaver.adapters import control_kind  # torch and peft, which finding a folder does without

    root = locate(
        source, marker="", revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    if (root / CONTROL_FILE).is_file():
        return root, control_kind(root)
    below = {file.parent.name: file.parent for file in sorted((root / "controls").glob(f"*/{CONTROL_FILE}"))}
    if name in below or (name is None and len(below) == 1):
        chosen = name or next(iter(below))
        return below[chosen], chosen
    if not below:
        raise ValueError(f"{os.fspath(source)!r} holds no {CONTROL_FILE}; pass the folder or repository of a control")
    raise ValueError(f"{os.fspath(source)!r} holds the controls {', '.join(below)}; pass one of them as name=")


def full_id(repo_id: str, *, token: str | bool | None = None) -> str:
    """A repository's id with its owner, who is you unless it says so."""
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{HfApi(token=token).whoami()['name']}/{repo_id}"


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
    made = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=made.repo_id, folder_path=Path(folder), commit_message=commit_message, create_pr=create_pr
    )
    return str(commit.pr_url or commit.commit_url)


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    card: Card | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload scaleweaver model",
    create_pr: bool = False,
) -> str:
    """Put a saved pipeline or control into a Hub repository, made if it is not there; the folder stays as it is.

    With `card`, or where there is none, one is written for the repository; the training run is found by itself if the
    folder lies in its `result`. Returns the address of the commit.
    """
    folder = Path(folder).absolute()
    if not any((folder / marker).is_file() for marker in (MODEL_FILE, CONTROL_FILE)):
        raise ValueError(f"{os.fspath(folder)!r} holds neither {MODEL_FILE} nor {CONTROL_FILE}; pass a saved model")
    send = partial(
        upload, repo_id=repo_id, private=private, token=token, commit_message=commit_message, create_pr=create_pr
    )
    if card is None and (folder / "README.md").exists():
        return send(folder)
    card, name = card or Card(), full_id(repo_id, token=token)
    run = _run_of(folder) if card.run is None else card.run
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "model"
        # the old card stays behind; below controls/ others have theirs
        shutil.copytree(
            folder, place, copy_function=_link, ignore=lambda here, _: _OF_A_CARD if here == os.fspath(folder) else ()
        )
        write_card(place, replace(card, run=run), name=name, base=_base_of(folder, run))
        return send(place)


def _link(source: str, target: str) -> str:
    """In place of a copy: weights may be large."""
    try:
        os.symlink(source, target)
    except OSError:  # where links need a privilege
        shutil.copy2(source, target)
    return target


def _run_of(folder: Path) -> Path | None:
    """The training run in whose `result` a folder lies."""
    results = [place for place in (folder, folder.parent) if place.name == "result"]
    found = [place.parent for place in results if (place.parent / "config.json").is_file()]
    return found[0] if found else None


def _base_of(folder: Path, run: str | os.PathLike[str] | None) -> str | None:
    """What a trained control fits, by the card that the training wrote, which knew a Hub id from a folder.

    Else it is the last part of what the run's settings call its model: where a folder lies says nothing elsewhere.
    """
    if (folder / "README.md").is_file():
        known = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.get("base_model")
        if isinstance(known, str):
            return known
    if run is None or not (Path(run) / "config.json").is_file():
        return None
    options = json.loads((Path(run) / "config.json").read_text(encoding="utf-8")).get("options", {})
    return Path(str(options["model"])).name if "model" in options else None
