"""Visual autoregressive (next-scale) image generation with control.

Names load on first use, so that `import scaleweaver` and `scaleweaver --help` do not wait for torch and diffusers.
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# in a checkout the folders kernels/ and controls/ lie beside this package, not inside it as in an installed one
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "pyproject.toml")) and _os.path.isdir(_os.path.join(_root, "kernels")):
    __path__.append(_root)
del _root

if TYPE_CHECKING:
    from scaleweaver.backbones.infinity import InfinityTransformer
    from scaleweaver.contracts import Control
    from scaleweaver.pipeline import VARControlPipeline
    from scaleweaver.schedule import ScaleSchedule, ScaleStep
    from scaleweaver.tokenizers.bsq import BSQTokenizer

# networks are here too: a saved pipeline names its parts as ["scaleweaver", "<class>"]
_MODULE_OF = {
    "BSQTokenizer": "scaleweaver.tokenizers.bsq",
    "Control": "scaleweaver.contracts",
    "InfinityTransformer": "scaleweaver.backbones.infinity",
    "ScaleSchedule": "scaleweaver.schedule",
    "ScaleStep": "scaleweaver.schedule",
    "VARControlPipeline": "scaleweaver.pipeline",
}

__all__ = [
    "BSQTokenizer",
    "Control",
    "InfinityTransformer",
    "ScaleSchedule",
    "ScaleStep",
    "VARControlPipeline",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
