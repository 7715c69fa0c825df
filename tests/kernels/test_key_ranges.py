"""Key ranges: dense masks, and the tables by which tiles find each other."""

from __future__ import annotations

import random

import pytest
import torch

from scaleweaver.kernels.key_ranges import KeyRanges

CPU = torch.device("cpu")


def draw(seed: int) -> tuple[KeyRanges, int]:
    """Random runs, empty ones among them, and a number of keys."""
    rng = random.Random(seed)
    keys = rng.randint(1, 70)
    runs = []
    for _ in range(rng.randint(1, 6)):
        start, end = sorted((rng.randint(0, keys), rng.randint(0, keys)))
        runs.append((rng.randint(1, 25), start, end))
    return KeyRanges(tuple(runs)), keys


def check(entry: list[int], at: int, tile: torch.Tensor, *, real_keys: bool) -> None:
    """Whatever is visible is visited, and only what is visible as a whole is free of the mask."""
    first, stop, free, bound = entry
    assert first <= at < stop or not tile.any()
    assert not free <= at < bound or (tile.all() and real_keys)


def test_dense() -> None:
    ranges = KeyRanges(((1, 0, 2), (2, 1, 1), (1, 2, 4)))
    want = [[1, 1, 0, 0, 0], [0] * 5, [0] * 5, [0, 0, 1, 1, 0]]
    assert torch.equal(ranges.dense(5, CPU), torch.tensor(want, dtype=torch.bool))
    assert ranges.rows == 4 and ranges.end == 4
    assert ranges.spans(CPU).tolist() == [[0, 1, 1, 2], [2, 1, 1, 4]]
    assert ranges.dense(5, CPU) is KeyRanges(ranges.runs).dense(5, CPU)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rows, count", [(16, 16), (8, 32)])
def test_tiles(seed: int, rows: int, count: int) -> None:
    ranges, keys = draw(seed)
    mask = ranges.dense(keys, CPU)  # (L, keys)
    tiles = [part.split(count, dim=1) for part in mask.split(rows)]
    of_keys = ranges.tiles_of_keys(rows, count, CPU)
    of_queries = ranges.tiles_of_queries(keys, rows, count, CPU)
    assert of_keys.shape == (len(tiles), 4) and of_queries.shape == (len(tiles[0]), 4)
    assert of_keys.dtype == of_queries.dtype == torch.int32
    for i, line in enumerate(tiles):
        for j, tile in enumerate(line):
            check(of_keys[i].tolist(), j, tile, real_keys=tile.shape[1] == count)
            check(of_queries[j].tolist(), i, tile, real_keys=True)  # what lies beyond the keys is never stored
    for i, line in enumerate(tiles):  # nothing is visited in vain at the ends
        seen = [j for j, tile in enumerate(line) if tile.any()]
        assert of_keys[i, :2].tolist() == ([seen[0], seen[-1] + 1] if seen else [0, 0])


def test_a_large_schedule_masks_few_tiles() -> None:
    """Block-causal at 1024x1024: 4 % of the visited tiles hold an edge of the mask."""
    sides = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
    runs = tuple((n * n, 0, sum(m * m for m in sides[: i + 1])) for i, n in enumerate(sides))
    first, stop, free, bound = KeyRanges(runs).tiles_of_keys(128, 128, CPU).unbind(1)
    assert 0 < 1 - (bound - free).sum() / (stop - first).sum() < 0.05


def test_what_is_no_range() -> None:
    for runs in ((), ((0, 0, 1),), ((1, 2, 1),), ((1, -1, 1),)):
        with pytest.raises(ValueError, match="expected"):
            KeyRanges(runs)  # type: ignore[arg-type]
