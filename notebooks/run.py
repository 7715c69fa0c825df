"""Run the notebooks, all in one kernel, and keep what they show: `make notebooks`.

python notebooks/run.py                  # all of them, in their places
python notebooks/run.py 4_next_scale_generation
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


@contextmanager
def kernel() -> Iterator[KernelManager]:
    """One that stands in this folder; torch is imported once for all notebooks."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(HERE))
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def execute(manager: KernelManager, path: Path, settings: Mapping[str, Any] | None = None) -> Any:
    """The notebook with its outputs; `settings` follow the cell tagged "parameters". An error in a cell is raised."""
    book = nbformat.read(path, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    original = [cell.source for cell in cells]
    cells[0].source = f"%reset -sf\n{cells[0].source}"  # what another notebook left
    for cell in cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in (settings or {}).items())
    NotebookClient(book, km=manager, timeout=3600).execute()
    for number, (cell, source) in enumerate(zip(cells, original, strict=True), start=1):
        cell.source, cell.execution_count = source, number  # the kernel counts on from one notebook to the next
        # without progress bars and what libraries warn of
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr" and not _is_progress(out)]
        for out in cell.outputs:
            if "execution_count" in out:
                out.execution_count = number
        cell.metadata.pop("execution", None)
    return book


def _is_progress(out: Any) -> bool:
    """Drawn by rich, which writes HTML."""
    return out.output_type == "display_data" and str(out.data.get("text/html", "")).startswith("<pre style")


def main(names: Iterable[str]) -> None:
    paths = [HERE / f"{name.removesuffix('.ipynb')}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb"))
    with kernel() as manager:
        for path in paths:
            nbformat.write(execute(manager, path), path)
            print(f"{path.name}  {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
