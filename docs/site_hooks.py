"""What the site is made of besides the pages in docs/: model cards, the command line's help, links into the repository.

mkdocs calls the functions by their names; `hooks` in mkdocs.yml names this file.
"""

from __future__ import annotations

import logging
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

logger = logging.getLogger("mkdocs.hooks.site")
ROOT = Path(__file__).resolve().parent.parent
ASSETS = "scaleweaver/assets"
CARDS = "models"  # where the site has the folders of ASSETS
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
_SHOWN = (".md", ".jpg", ".png", ".txt")


def on_startup(command: str, dirty: bool) -> None:
    """Copy the sources to build/reference: in the repository controls/, demo/ and kernels/ lie beside the package."""
    package = ROOT / "build" / "reference" / "scaleweaver"
    shutil.rmtree(package, ignore_errors=True)
    for folder in ("scaleweaver", "controls", "demo", "kernels"):
        place = package if folder == "scaleweaver" else package / folder
        for source in (ROOT / folder).rglob("*.py"):
            copy = place / source.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)


def on_files(files: Files, config: Any) -> Files:
    """The cards of the models that ship with the package, with their pictures."""
    for source in sorted((ROOT / ASSETS).rglob("*")):
        if source.suffix in _SHOWN and source.is_file():
            place = f"{CARDS}/{source.relative_to(ROOT / ASSETS).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that leave docs/, and the help of the command line."""
    if "<!-- command line -->" in markdown:
        markdown = markdown.replace("<!-- command line -->", command_line())
    return _LINK.sub(lambda found: inside(found, page.file.src_uri, config.repo_url), markdown)


def inside(found: re.Match[str], page: str, repository: str | None) -> str:
    """A link as the site can follow it: to a card, to the repository if its address is known, else its text alone."""
    mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if ":" in target or target.startswith("/"):
        return found[0]
    place = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if not place.startswith("../"):
        return found[0]
    place = place.removeprefix("../")
    if place.startswith(f"{ASSETS}/"):
        card = posixpath.relpath(place.replace(ASSETS, CARDS, 1), posixpath.dirname(page) or ".")
        return f"{mark}[{text}]({card}{anchor})"
    if not (ROOT / place).exists():
        logger.warning("%s links to %s, which is not there", page, target)  # with `strict` the build fails
    return f"{mark}[{text}]({repository}/blob/main/{place}{anchor})" if repository else text


def command_line() -> str:
    """The help of every command, as typer writes it for documents."""
    command = [sys.executable, "-m", "typer", "scaleweaver.cli", "utils", "docs", "--name", "scaleweaver"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return "\n".join(_lowered(done.stdout))


def _lowered(text: str) -> Iterator[str]:
    """Headings one level down, without the first, which the page has."""
    lines = text.splitlines()
    yield from (f"#{line}" if line.startswith("##") else line for line in lines[1:])
