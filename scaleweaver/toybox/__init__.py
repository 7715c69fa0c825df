"""The built-in world: scenes, their captions, their pictures, and the exact depth, masks and poses behind them.

Names load on first use, so that importing the package does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scaleweaver.toybox.captions import caption, vocabulary
    from scaleweaver.toybox.dataset import (
        ToyboxBatch,
        ToyboxBatches,
        ToyboxDataset,
        ToyboxSample,
        caption_of,
        draw_batch,
    )
    from scaleweaver.toybox.drawing import depth_map, draw_skeleton, ids_map
    from scaleweaver.toybox.folder import write_folder
    from scaleweaver.toybox.render import Frames
    from scaleweaver.toybox.scene import Camera, Person, Scene, Thing, attributes, relations, sample_scene
    from scaleweaver.toybox.store import RenderStore, cache_renders
    from scaleweaver.toybox.worlds import World, world_of

_MODULE_OF = {
    "Camera": "scene",
    "Frames": "render",
    "Person": "scene",
    "RenderStore": "store",
    "Scene": "scene",
    "Thing": "scene",
    "ToyboxBatch": "dataset",
    "ToyboxBatches": "dataset",
    "ToyboxDataset": "dataset",
    "ToyboxSample": "dataset",
    "World": "worlds",
    "attributes": "scene",
    "cache_renders": "store",
    "caption": "captions",
    "caption_of": "dataset",
    "depth_map": "drawing",
    "draw_batch": "dataset",
    "draw_skeleton": "drawing",
    "ids_map": "drawing",
    "relations": "scene",
    "sample_scene": "scene",
    "vocabulary": "captions",
    "world_of": "worlds",
    "write_folder": "folder",
}

__all__ = [
    "Camera",
    "Frames",
    "Person",
    "RenderStore",
    "Scene",
    "Thing",
    "ToyboxBatch",
    "ToyboxBatches",
    "ToyboxDataset",
    "ToyboxSample",
    "World",
    "attributes",
    "cache_renders",
    "caption",
    "caption_of",
    "depth_map",
    "draw_batch",
    "draw_skeleton",
    "ids_map",
    "relations",
    "sample_scene",
    "vocabulary",
    "world_of",
    "write_folder",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
