"""The tabs of the page, one file each: `TITLE`, `ORDER` (small ones come first) and `build(studio)`, which lays it out.

A file that is put here is a tab; nothing else has to know of it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from scaleweaver.demo.studio import Studio


@dataclass(frozen=True)
class Tab:
    name: str
    title: str
    order: int
    build: Callable[[Studio], None]


def find_tabs() -> list[Tab]:
    """All tabs of this folder, in the order in which the page shows them."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: import_module(f"{__name__}.{name}") for name in names}
    found = [Tab(name, module.TITLE, module.ORDER, module.build) for name, module in modules.items()]
    return sorted(found, key=lambda tab: (tab.order, tab.name))
