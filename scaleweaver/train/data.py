"""What the recipes read: renders in an order that depends on the seed alone, control maps, latents computed once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.toybox.drawing import draw_skeleton
from scaleweaver.toybox.store import RenderStore, cache_renders

Pixels = NDArray[np.uint8]
Source = str | Mapping[str, Any]


class Renders:
    """Pictures of one or several render stores as one list: those that were complete when it was made.

    A source is the folder of a store, or the arguments of `cache_renders` ({path, split, count, ...}), which then
    renders what is still missing.
    """

    def __init__(self, sources: Source | Sequence[Source]):
        listed = [sources] if isinstance(sources, (str, Mapping)) else sources
        self.stores = [RenderStore(s) if isinstance(s, str) else cache_renders(**s) for s in listed]
        self.counts = [len(s) for s in self.stores]
        if not sum(self.counts):
            raise ValueError(
                f"{sources} holds no finished picture; give path, split and count as in recipes/toybox to render it"
            )

    def __len__(self) -> int:
        return sum(self.counts)

    def _find(self, row: int) -> tuple[RenderStore, int]:
        for store, count in zip(self.stores, self.counts, strict=True):
            if row < count:
                return store, row
            row -= count
        raise IndexError(row)

    def image(self, row: int) -> Pixels:
        """(H, W, 3)."""
        store, i = self._find(row)
        return np.array(store.images[i])

    def captions(self, row: int) -> list[str]:
        """The wordings kept for this picture."""
        store, i = self._find(row)
        return store.texts(i)

    def source(self, row: int) -> tuple[str, int]:
        """Split and index of the scene, as `toybox.scene.sample_scene` takes them."""
        store, i = self._find(row)
        return store.settings["split"], store.settings["start"] + i

    def _map(self, name: str, row: int) -> NDArray[Any]:
        store, i = self._find(row)
        if name not in store.maps:
            raise ValueError(f'{store.path} was rendered without "{name}"; render it with maps=("depth", "keypoints")')
        return np.array(store.maps[name][i])

    def depth(self, row: int) -> Pixels:
        """(H, W, 3), near is bright."""
        return np.repeat(self._map("depth", row)[..., None], 3, axis=2)

    def skeleton(self, row: int) -> Pixels | None:
        """(H, W, 3) drawing of the person's key points, None where there is nobody."""
        points = self._map("keypoints", row)
        if not points.any():
            return None
        return np.asarray(draw_skeleton(points[None], self.image(row).shape[0]))


def shuffled(count: int, seed: int, start: int, size: int) -> list[int]:
    """Rows `start` to `start + size` of an endless list of epochs, each a permutation of range(count) of its own."""
    rows: list[int] = []
    while len(rows) < size:
        epoch, offset = divmod(start + len(rows), count)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        rows += order[offset : offset + size - len(rows)].tolist()
    return rows


def random_canny(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Edge map (H, W, 3), thresholds drawn around the usual 100 / 200 so that an adapter is not tied to one pair."""
    low, high = rng.uniform(50, 120), rng.uniform(100, 240)
    edges = cv2.Canny(picture, min(low, high), max(low, high))
    return np.repeat(edges[..., None], 3, axis=2)


def random_control_map(renders: Renders, row: int, rng: np.random.Generator) -> Pixels:
    """Edges (half of the time), depth or skeleton of a picture, (H, W, 3)."""
    choice = rng.choice(["canny", "canny", "depth", "skeleton"])
    if choice == "skeleton" and (drawing := renders.skeleton(row)) is not None:
        return drawing
    return renders.depth(row) if choice == "depth" else random_canny(renders.image(row), rng)


def to_images(pictures: Pixels) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def as_pixels(images: Tensor) -> Pixels:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path: Path, pictures: Pixels, columns: int) -> None:
    """A contact sheet of (B, H, W, 3), written as PNG."""
    missing = -len(pictures) % columns
    padded = np.concatenate([pictures, np.zeros((missing, *pictures.shape[1:]), np.uint8)])
    rows = padded.reshape(-1, columns, *pictures.shape[1:])  # (rows, columns, H, W, 3)
    sheet = rows.transpose(0, 2, 1, 3, 4).reshape(-1, columns * pictures.shape[2], 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def cached_latents(
    folder: str | os.PathLike[str], vae: BSQTokenizer, renders: Renders, batch: int = 32
) -> NDArray[np.float16]:
    """Continuous latents (count, d, Hl, Wl) of all renders, computed once per tokenizer and kept in `folder`."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    mark = {"count": len(renders), "fingerprint": fingerprint(vae), "stores": [str(s.path) for s in renders.stores]}
    done = path / "latents.json"
    if done.is_file() and json.loads(done.read_text()) == mark:
        return np.load(path / "latents.npy", mmap_mode="r")
    done.unlink(missing_ok=True)
    side = renders.image(0).shape[0] // vae.config["stride"]
    shape = (len(renders), vae.config["bits"], side, side)
    out = np.lib.format.open_memmap(path / "latents.npy", mode="w+", dtype=np.float16, shape=shape)
    with torch.no_grad():
        for start in range(0, len(renders), batch):
            pictures = np.stack([renders.image(i) for i in range(start, min(start + batch, len(renders)))])
            images = to_images(pictures).to(vae.device, vae.dtype)
            out[start : start + batch] = vae.encode(images).cpu().numpy().astype(np.float16)
    out.flush()
    done.write_text(json.dumps(mark))
    return np.load(path / "latents.npy", mmap_mode="r")


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of all weights, to notice that cached features come from another model."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
