"""The Python of the guides runs, block after block, as a reader would run it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.hub import built_in_folder

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
TOYBOX = built_in_folder("toybox")


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Line and code of every ```python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the examples of a clone, and a control and LoRAs that a reader would have."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(TOYBOX / "controls" / "canny", tmp_path / "controls" / "my-canny")
    for name in ("watercolour", "night"):
        backbone: Any = InfinityTransformer.from_pretrained(TOYBOX / "transformer")
        config = LoraConfig(r=2, target_modules=r".*attn\.qkv", init_lora_weights=False)
        get_peft_model(backbone, config).save_pretrained(tmp_path / "loras" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guide(page: Path, clone: Path) -> None:
    blocks = python_blocks(page)
    assert blocks
    names: dict[str, Any] = {}
    for line, code in blocks:
        # empty lines before it, so that a traceback tells the line of the page
        exec(compile("\n" * line + code, str(page), "exec"), names)
        pipe = names.get("pipe")
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)
