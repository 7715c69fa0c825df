"""The Python of the pages runs, block after block, as a reader would run it; links and the list of pages are whole.

Blocks marked ```python are run, those marked ```py only shown: they need a network, files of one's own, or minutes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.hub import built_in_folder

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOYBOX = built_in_folder("toybox")
RUN = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Line and code of every ```python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture
def clone(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the examples of a clone, and a control and LoRAs that a reader would have."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(TOYBOX / "controls" / "canny", tmp_path / "controls" / "my-canny")
    if "loras/" not in page.read_text(encoding="utf-8"):
        return tmp_path
    for name in ("watercolour", "night"):
        backbone: Any = InfinityTransformer.from_pretrained(TOYBOX / "transformer")
        config = LoraConfig(r=2, target_modules=r".*attn\.qkv", init_lora_weights=False)
        get_peft_model(backbone, config).save_pretrained(tmp_path / "loras" / name)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in RUN if python_blocks(page)], ids=lambda page: page.stem)
def test_python(page: Path, clone: Path) -> None:
    names: dict[str, Any] = {}
    for line, code in python_blocks(page):
        # empty lines before it, so that a traceback tells the line of the page
        exec(compile("\n" * line + code, str(page), "exec"), names)
        pipe = names.get("pipe")
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)


def test_pages_with_python_are_found() -> None:
    assert {page.name for page in RUN if python_blocks(page)} >= {
        "README.md",
        "index.md",
        "controls.md",
        "cost.md",
        "toybox.md",
        "first_picture.md",
        "photo_to_picture.md",
        "several_controls.md",
        "hub.md",
        "diffusers.md",
    }


def entries(nav: Any) -> Iterator[str]:
    """The pages that a nav names."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(item)


def test_every_page_is_in_the_nav() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(entries(config["nav"]))
    assert len(set(listed)) == len(listed)
    # the cards of the shipped models come from beside the weights, as docs/site_hooks.py says
    cards = ROOT / "scaleweaver" / "assets"
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    there |= {f"models/{page.relative_to(cards).as_posix()}" for page in cards.rglob("*.md")}
    assert set(listed) == there


PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "notebooks" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^()\s#]*)(?:#([^()\s]*))?\)", text):
        if ":" in target or target.startswith("models/") or "/models/" in target:
            continue  # elsewhere, or a page that the site makes of a card
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT), f"{page.name} links to {target}, outside of the repository"
        if anchor and file.suffix == ".md" and "." not in anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What headings of a page are linked by."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    words = [re.sub(r"[^\w\s-]", "", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"\s+", "-", title.strip()) for title in words}
