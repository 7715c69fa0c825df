"""What the recipes read: renders in an order that depends on the seed alone, control maps, features computed once."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.toybox.drawing import draw_skeleton
from scaleweaver.toybox.progress import rendering_progress
from scaleweaver.toybox.scene import Scene, sample_scene
from scaleweaver.toybox.store import RenderStore, cache_renders, write_atomic
from scaleweaver.train.online import BLOCK, OnlineRenders

FLUSHED = 32  # after so many batches of features the ones done are noted

Pixels = NDArray[np.uint8]
Source = str | Mapping[str, Any]


class Pictures(Protocol):
    """A numbered list of captioned pictures: renders or photos."""

    @property
    def online(self) -> bool: ...

    def __len__(self) -> int: ...

    def image(self, row: int) -> Pixels: ...

    def captions(self, row: int) -> list[str]: ...


class Renders:
    """Pictures of one or several render stores as one list: those that were complete when it was made.

    A source is the folder of a store, the arguments of `cache_renders` ({path, split, count, ...}), which then renders
    what is still missing, or {online: true, split, count, start, ...}, which renders every picture when it is read.
    {path, ..., parts: n} stands for n stores that can be rendered side by side, see `stores_of`.
    """

    def __init__(self, sources: Source | Sequence[Source]):
        self.stores = [_opened(source) for source in stores_of(sources)]
        self.counts = [len(s) for s in self.stores]
        if not sum(self.counts):
            raise ValueError(
                f"{sources} holds no finished picture; give path, split and count as in recipes/toybox to render it"
            )

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def online(self) -> bool:
        """Whether some pictures are rendered when they are read, so that features of all are not computed ahead."""
        return any(isinstance(store, OnlineRenders) for store in self.stores)

    def rows(self, seed: int, start: int, size: int) -> list[int]:
        """`shuffled` rows; in blocks that are rendered together where pictures are rendered when read."""
        return shuffled(len(self), seed, start, size, BLOCK if self.online else 1)

    def _find(self, row: int) -> tuple[RenderStore | OnlineRenders, int]:
        for store, count in zip(self.stores, self.counts, strict=True):
            if row < count:
                return store, row
            row -= count
        raise IndexError(row)

    def image(self, row: int) -> Pixels:
        """(H, W, 3)."""
        store, i = self._find(row)
        return store.image(i)

    def captions(self, row: int) -> list[str]:
        """The wordings kept for this picture."""
        store, i = self._find(row)
        return store.texts(i)

    def source(self, row: int) -> tuple[str, int]:
        """Split and index of the scene, as `toybox.scene.sample_scene` takes them."""
        store, i = self._find(row)
        settings: Mapping[str, Any] = store.settings
        return settings["split"], settings["start"] + i

    def scene(self, row: int) -> Scene:
        """What a picture shows, sampled again from the split, index and version it came from."""
        settings: Mapping[str, Any] = self._find(row)[0].settings
        return sample_scene(*self.source(row), version=settings["version"])

    def explicit_caption(self, row: int) -> str:
        """The wording that says all that can be asked of this picture; needs no rendering."""
        return explicit_caption(self.scene(row))

    def told_in_full(self, rows: Sequence[int], texts: Sequence[str], replaced: Sequence[bool]) -> list[str]:
        """The texts of some rows, those marked as replaced by explicit captions; an empty text stays empty."""
        return [
            self.explicit_caption(row) if full and text else text
            for row, text, full in zip(rows, texts, replaced, strict=True)
        ]

    def depth(self, row: int) -> Pixels:
        """(H, W, 3), near is bright."""
        store, i = self._find(row)
        return np.repeat(store.map("depth", i)[..., None], 3, axis=2)

    def keypoints(self, row: int) -> NDArray[np.float32] | None:
        """(18, 3) of the first person: x, y in pixels and visibility; None where there is nobody."""
        store, i = self._find(row)
        points = store.map("keypoints", i)
        return points if points.any() else None

    def skeleton(self, row: int) -> Pixels | None:
        """(H, W, 3) drawing of the person's key points, None where there is nobody."""
        points = self.keypoints(row)
        return None if points is None else np.asarray(draw_skeleton(points[None], self.image(row).shape[0]))


def stores_of(sources: Source | Sequence[Source]) -> list[Source]:
    """The sources of single stores; one with `parts` becomes path-00, path-01, ..., of equally many pictures each."""
    single: list[Source] = []
    for source in [sources] if isinstance(sources, (str, Mapping)) else sources:
        if isinstance(source, str) or "parts" not in source:
            single.append(source)
            continue
        settings = dict(source)
        parts, count = settings.pop("parts"), settings.get("count", 0)
        if not isinstance(parts, int) or parts < 1 or count % parts or not {"path", "count"} <= set(settings):
            raise ValueError(f"{dict(source)} cannot be parted; set path, and count to a multiple of parts")
        each = count // parts
        for part in range(parts):
            start, path = settings.get("start", 0) + part * each, f"{settings['path']}-{part:02d}"
            single.append(settings | {"path": path, "start": start, "count": each})
    return single


def check_source(source: Mapping[str, Any]) -> None:
    """Refuses settings of a store, or of online pictures, that lack something or that nothing reads."""
    settings = dict(source)
    online = settings.pop("online", False)
    accepted = dict(inspect.signature(OnlineRenders if online else cache_renders).parameters)
    accepted.pop("on_progress", None)
    unknown = sorted(set(settings) - set(accepted))
    missing = [name for name, entry in accepted.items() if entry.default is entry.empty and name not in settings]
    if unknown or missing:
        kind, takes = "online pictures" if online else "a render store", ", ".join(accepted)
        wrong = f"do not take {', '.join(unknown)}" if unknown else f"lack {', '.join(missing)}"
        raise ValueError(f"the settings of pictures {dict(source)} {wrong}; {kind} can be given {takes}")


def _opened(source: Source) -> RenderStore | OnlineRenders:
    """The pictures of one source; shows how far rendering is where some are missing."""
    if isinstance(source, str):
        return RenderStore(source)
    check_source(source)
    settings = dict(source)
    if settings.pop("online", False):
        return OnlineRenders(**settings)
    with rendering_progress(f"rendering {settings['path']}") as on_progress:
        return cache_renders(**settings, on_progress=on_progress)


def shuffled(count: int, seed: int, start: int, size: int, block: int = 1) -> list[int]:
    """Rows `start` to `start + size` of an endless list of epochs, each a permutation of range(count) of its own.

    With a `block` above 1 only the blocks of so many rows change places.
    """
    rows: list[int] = []
    while len(rows) < size:
        epoch, offset = divmod(start + len(rows), count)
        order = np.random.default_rng((seed, epoch)).permutation(-(-count // block))
        if block > 1:
            order = (order[:, None] * block + np.arange(block)).reshape(-1)  # (blocks * block,)
            order = order[order < count]  # the last block may be a short one
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


def as_images(renders: Pictures, rows: Sequence[int]) -> dict[str, Tensor]:
    """The part of a batch that is pictures, as {"images"}: (B, 3, H, W) in [-1, 1]."""
    return {"images": to_images(np.stack([renders.image(row) for row in rows]))}


def as_latents(latents: NDArray[np.float16]) -> dict[str, Tensor]:
    """The part of a batch that is pictures, as {"latent"}: (B, d, Hl, Wl) float32."""
    return {"latent": torch.from_numpy(latents).float()}


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
    if renders.online:
        raise ValueError("latents of pictures that are rendered when read are not computed ahead; use a store")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    mark = {"count": len(renders), "fingerprint": fingerprint(vae), "stores": [str(s.path) for s in renders.stores]}
    done = path / "latents.json"
    found = json.loads(done.read_text()) if done.is_file() else {}
    if found == mark:
        return np.load(path / "latents.npy", mmap_mode="r")
    side = renders.image(0).shape[0] // vae.config["stride"]
    shape = (len(renders), vae.config["bits"], side, side)
    # an interrupted call goes on where it was
    first = found.pop("rows", 0) if found | {"rows": 0} == mark | {"rows": 0} else 0
    if not first:
        done.unlink(missing_ok=True)  # it speaks of what is overwritten now
    out = np.lib.format.open_memmap(path / "latents.npy", mode="r+" if first else "w+", dtype=np.float16, shape=shape)
    for start in range(first, len(renders), batch):
        out[start : start + batch] = encoded(vae, renders, range(start, min(start + batch, len(renders))))
        if start // batch % FLUSHED == 0:
            out.flush()
            write_atomic(done, json.dumps(mark | {"rows": start + batch}).encode())
    out.flush()
    write_atomic(done, json.dumps(mark).encode())
    return np.load(path / "latents.npy", mmap_mode="r")


@torch.no_grad()
def encoded(vae: BSQTokenizer, renders: Pictures, rows: Sequence[int]) -> NDArray[np.float16]:
    """Continuous latents (B, d, Hl, Wl) of some rows, computed where the tokenizer lies."""
    images = to_images(np.stack([renders.image(row) for row in rows])).to(vae.device, vae.dtype)
    return vae.encode(images).cpu().numpy().astype(np.float16)


def latent_reader(
    folder: str | os.PathLike[str], vae: BSQTokenizer, renders: Renders
) -> Callable[[Sequence[int]], NDArray[np.float16]]:
    """Rows -> latents (B, d, Hl, Wl): from `cached_latents`, or encoded when read where the pictures are online."""
    if renders.online:
        return lambda rows: encoded(vae, renders, rows)
    kept = cached_latents(folder, vae, renders)
    return lambda rows: np.stack([kept[row] for row in rows])


@dataclass(frozen=True)
class CachedText:
    """Text features of all wordings of all renders, packed: text j has features[offsets[j] : offsets[j + 1]]."""

    features: NDArray[np.float16]  # (tokens of all texts, T)
    offsets: NDArray[np.int64]  # (texts + 1,)
    first: NDArray[np.int64]  # (renders,) the text that is wording 0 of a row

    def read(self, rows: Sequence[int], wordings: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One wording of each row: float32 features (sum of lengths, T) and lengths (B,)."""
        texts = [int(self.first[row]) + wording for row, wording in zip(rows, wordings, strict=True)]
        parts = [self.features[self.offsets[j] : self.offsets[j + 1]] for j in texts]
        lengths = torch.tensor([len(part) for part in parts])
        return torch.from_numpy(np.concatenate(parts)).float(), lengths


@torch.no_grad()
def cached_text(
    folder: str | os.PathLike[str],
    encoder: T5EncoderModel | Callable[[], T5EncoderModel],
    tokenizer: PreTrainedTokenizerFast,
    renders: Pictures,
    *,
    max_length: int = 512,
    batch: int = 64,
    identity: str | None = None,
) -> CachedText:
    """Features of every wording of all pictures, computed once per encoder and kept in `folder`.

    With its `identity` the encoder may be a function that loads it, which is called only if something is missing.
    """
    if renders.online:
        raise ValueError("text of pictures that are rendered when read is not computed ahead; pass text_cache=false")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    wordings = [renders.captions(row) for row in range(len(renders))]
    first = np.cumsum([0, *(len(texts) for texts in wordings)])[:-1]
    texts = [text for each in wordings for text in each]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    lengths = np.array([len(tokens) for tokens in ids])
    offsets = np.cumsum([0, *lengths])
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]  # of captions and vocabulary alike
    mark = {"texts": len(ids), "ids": digest, "fingerprint": identity or fingerprint(encoder)}  # type: ignore[arg-type]
    done = path / "text.json"
    if not (done.is_file() and json.loads(done.read_text()) == mark):
        done.unlink(missing_ok=True)
        reader: T5EncoderModel = encoder if isinstance(encoder, T5EncoderModel) else encoder()
        shape = (int(offsets[-1]), reader.config.d_model)
        out = np.lib.format.open_memmap(path / "text.npy", mode="w+", dtype=np.float16, shape=shape)
        # texts of one length need no padding
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            tokens = tokenizer.pad({"input_ids": [ids[j] for j in chosen]}, return_tensors="pt").to(reader.device)
            states = reader(**tokens).last_hidden_state.float().cpu().numpy()  # (B, P, T)
            for j, state in zip(chosen, states, strict=True):
                out[offsets[j] : offsets[j + 1]] = state[: lengths[j]]
        out.flush()
        done.write_text(json.dumps(mark))
    return CachedText(np.load(path / "text.npy", mmap_mode="r"), offsets, first)


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of all weights, to notice that cached features come from another model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
