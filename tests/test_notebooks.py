"""The notebooks run from the first to the last cell, and what is kept of them is small and whole."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TINY = {"5_train_your_own_control": {"STEPS": 1, "BATCH": 2, "PICTURES": 16}}

spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
assert spec is not None and spec.loader is not None
runner: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)


def code(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> list[str]:
    """What a cell shows, output by output."""
    return [name for out in cell.outputs for name in (out.get("data") or {out["name"]: ""})]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One for all notebooks of this process: importing torch takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("kernel")))
        with runner.kernel() as manager:
            yield manager


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, kernel: Any) -> None:
    kept = nbformat.read(path, as_version=4)
    book = runner.execute(kernel, path, TINY.get(path.stem))
    # the kept outputs are those of this very code: what a cell shows now it shows in the file
    for now, before in zip(code(book), code(kept), strict=True):
        assert now.source == before.source
        assert kinds(now) == kinds(before), f"run `make notebooks`: {now.source[:200]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    assert path.stat().st_size < 200_000
    counts = [cell.execution_count for cell in code(book)]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`: not run from first to last"
    assert not [out for cell in code(book) for out in cell.outputs if out.output_type == "error"]
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a path of somebody's machine"


def test_the_list_of_notebooks() -> None:
    listed = re.findall(r"\]\((\w+\.ipynb)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert listed == [path.name for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for target in re.findall(
                r"\]\(([^():#]+?)(?:#[^)]*)?\)", cell.source if cell.cell_type == "markdown" else ""
            ):
                assert (FOLDER / target).exists(), f"{path.name} links to {target}"
