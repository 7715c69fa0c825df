"""Assembles a Hugging Face Space of the page: `python -m scaleweaver.demo.make_space --out FOLDER`.

The package lies in the Space as files, for a Space installs only what is published; its requirements are pinned to the
versions that are installed here.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

FOLDER = Path(__file__).parent
EXTRA = "demo"
BESIDE = ("controls", "demo", "kernels")  # in a checkout these do not lie inside the package
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.py[cod]")


def make_space(folder: Path) -> None:
    """Write app.py, README.md, requirements.txt and the package into a folder that is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; pass a new folder")
    for name in ("", *BESIDE):
        module = importlib.import_module(f"scaleweaver.{name}".rstrip("."))
        source = Path(str(module.__file__)).parent
        shutil.copytree(source, folder / "scaleweaver" / name, ignore=NOT_COPIED, dirs_exist_ok=True)
    shutil.copy(FOLDER / "app.py", folder / "app.py")
    shutil.copy(FOLDER / "space.md", folder / "README.md")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")


def requirements() -> list[str]:
    """What the page needs besides gradio, which comes with the Space's sdk_version."""
    wanted = [Requirement(line) for line in requires("scaleweaver") or []]
    return [_pinned(each) for each in wanted if each.name != "gradio" and _is_needed(each)]


def _is_needed(requirement: Requirement) -> bool:
    text = str(requirement.marker or "")
    return "extra" not in text or requirement.marker.evaluate({"extra": EXTRA})  # type: ignore[union-attr]


def _pinned(requirement: Requirement) -> str:
    """The version that is installed here, without the name of its build; what is for some platforms keeps its range."""
    if requirement.marker is not None and "extra" not in str(requirement.marker):
        return str(requirement)
    return f"{requirement.name}=={Version(version(requirement.name)).public}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    folder = parser.parse_args().out
    try:
        make_space(folder)
    except ValueError as error:
        parser.error(str(error))
    print(f"{folder}: hf upload USER/NAME {folder} . --repo-type space")


if __name__ == "__main__":
    main()
