"""Key ranges: row r of the queries sees keys [start, end). As runs of equal rows, so that they are small and hashable.

Dense masks and the tables that the attention kernels walk by derive from them; both are made once and remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LARGEST_KEPT = 16 * 2**20  # bytes of a mask that stays on its device between calls, one byte per entry


@dataclass(frozen=True)
class KeyRanges:
    """runs: (rows, start, end) each, one run after the other; a run that ends where it starts sees nothing."""

    runs: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not self.runs or any(rows < 1 or not 0 <= start <= end for rows, start, end in self.runs):
            raise ValueError(f"key ranges {self.runs}: expected (rows, start, end) with rows >= 1, 0 <= start <= end")

    @property
    def rows(self) -> int:
        return sum(rows for rows, _, _ in self.runs)

    @property
    def end(self) -> int:
        """The number of keys that there must be at least."""
        return max(end for _, _, end in self.runs)

    def dense(self, keys: int, device: torch.device) -> Tensor:
        """Boolean mask (L, keys), True where a row sees a key; remembered unless it is large."""
        make = _small_mask if self.rows * keys <= LARGEST_KEPT else _mask
        return make(self, keys, device)

    def spans(self, device: torch.device) -> Tensor:
        """Starts and ends of every row, (2, L) int32, remembered."""
        return _spans(self, device)

    def tiles_of_keys(self, rows: int, keys: int, device: torch.device) -> Tensor:
        """(tiles of `rows` queries, 4) int32, remembered: which tiles of `keys` keys a tile of queries visits, as
        [first, stop) and, within, the [first, stop) of those that all of its rows see whole.
        """
        return _tiles_of_keys(self, rows, keys, device)

    def tiles_of_queries(self, count: int, rows: int, keys: int, device: torch.device) -> Tensor:
        """The same for the tiles of `count` keys: which tiles of queries visit them, (tiles of keys, 4) int32."""
        return _tiles_of_queries(self, count, rows, keys, device)


def dense(start: Tensor, end: Tensor, keys: int) -> Tensor:
    """Starts and ends (L,) -> boolean mask (L, keys), True where the row may see the key."""
    index = torch.arange(keys, device=start.device)
    return (index >= start[:, None]) & (index < end[:, None])


def forgotten() -> int:
    """How many tables for the kernels have made room for newer ones: whoever recorded their addresses must look."""
    infos = [table.cache_info() for table in (_spans, _tiles_of_keys, _tiles_of_queries)]
    return sum(info.misses - info.currsize for info in infos)


@lru_cache(maxsize=8)
def _small_mask(ranges: KeyRanges, keys: int, device: torch.device) -> Tensor:
    return _mask(ranges, keys, device)


def _mask(ranges: KeyRanges, keys: int, device: torch.device) -> Tensor:
    # a tensor made under inference_mode could not be used for training later
    with torch.inference_mode(False):
        return dense(*_vectors(ranges), keys).to(device)


@lru_cache(maxsize=256)
def _spans(ranges: KeyRanges, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.stack(_vectors(ranges)).to(device)


def _vectors(ranges: KeyRanges) -> tuple[Tensor, Tensor]:
    columns = [torch.tensor(run, dtype=torch.int32)[1:, None].expand(2, run[0]) for run in ranges.runs]  # (2, rows)
    start, end = torch.cat(columns, dim=1)  # (L,), (L,)
    return start, end


@lru_cache(maxsize=256)
def _tiles_of_keys(ranges: KeyRanges, rows: int, keys: int, device: torch.device) -> Tensor:
    table = []
    for runs in _runs_of_tiles(ranges, rows):
        seeing = [(start, end) for start, end in runs if end > start]
        first = min((start for start, _ in seeing), default=0) // keys
        stop = -(-max((end for _, end in seeing), default=0) // keys)
        free, bound = -(-max(start for start, _ in runs) // keys), min(end for _, end in runs) // keys
        table.append((first, stop, free, bound) if free < bound else (first, stop, 0, 0))
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _tiles_of_queries(ranges: KeyRanges, count: int, rows: int, keys: int, device: torch.device) -> Tensor:
    tiles = list(_runs_of_tiles(ranges, rows))
    table = []
    for low in range(0, count, keys):
        high = min(low + keys, count)
        visiting = [i for i, runs in enumerate(tiles) if any(max(s, low) < min(e, high) for s, e in runs)]
        whole = [i for i in visiting if all(s <= low and high <= e for s, e in tiles[i])]
        first, stop = (visiting[0], visiting[-1] + 1) if visiting else (0, 0)
        together = bool(whole) and whole[-1] - whole[0] + 1 == len(whole)
        table.append((first, stop, whole[0], whole[-1] + 1) if together else (first, stop, 0, 0))
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.int32, device=device)


def _runs_of_tiles(ranges: KeyRanges, rows: int) -> Sequence[list[tuple[int, int]]]:
    """The key ranges that occur in each tile of `rows` queries."""
    tiles: list[list[tuple[int, int]]] = [[] for _ in range(-(-ranges.rows // rows))]
    row = 0
    for count, start, end in ranges.runs:
        for tile in range(row // rows, -(-(row + count) // rows)):
            tiles[tile].append((start, end))
        row += count
    return tiles
