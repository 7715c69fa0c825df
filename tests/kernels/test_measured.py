"""The choice between torch's attention and the kernel where no mask exists, by made-up timings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from scaleweaver.kernels import interval_attention
from scaleweaver.kernels.dispatch import use_kernels
from scaleweaver.kernels.measured import SHIPPED, Timing, kernel_is_faster, load, record, use_timings

HERE = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = Timing(HERE, 16, "float32", rows=2, heads=2, queries=9, keys=20, torch_ms=2.0, kernel_ms=1.0)
SLOW = replace(FAST, queries=40, keys=60, torch_ms=1.0, kernel_ms=2.0)


def draw(queries: int, keys: int, rows: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 2, n, 16, generator=generator).to(DEVICE) for n in (queries, keys, keys)]


def chosen(timings: list[Timing], queries: int, keys: int, dtype: torch.dtype = torch.float32, rows: int = 2) -> bool:
    q, k, _ = draw(queries, keys, rows)
    with use_timings(timings):
        return kernel_is_faster(q.to(dtype), k.to(dtype))


def test_what_is_shipped_is_of_gpus_and_leaves_a_cpu_alone():
    shipped = load()
    assert len({timing.shape for timing in shipped}) == len(json.loads(SHIPPED.read_text()))
    assert all(timing.capability >= (8, 0) for timing in shipped)
    q, k, _ = (x.cpu() for x in draw(9, 20))
    with use_timings([*shipped, replace(FAST, capability=(8, 0))]):
        assert not kernel_is_faster(q, k)
    with use_timings([*shipped, replace(FAST, capability=(0, 0))]):  # as if a CPU had been timed
        assert kernel_is_faster(q, k)


def test_the_nearest_timing_decides():
    table = [FAST, SLOW]
    assert chosen(table, 9, 20) and not chosen(table, 40, 60)
    assert chosen(table, 7, 25) and not chosen(table, 30, 50)  # near one of them
    assert not chosen(table, 9, 40) and not chosen(table, 20, 20)  # far from both
    assert not chosen(table, 9, 20, torch.float16) and not chosen([replace(FAST, head_width=32)], 9, 20)
    assert not chosen([replace(FAST, capability=(12, 0))], 9, 20)
    many = replace(FAST, rows=16, torch_ms=0.5)
    assert chosen([many, FAST], 9, 20, rows=2) and not chosen([many, FAST], 9, 20, rows=12)


def test_the_dispatcher_asks(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    q, k, v = draw(9, 20)
    launched = []
    launch = interval_attention.interval_attention
    monkeypatch.setattr(
        interval_attention, "interval_attention", lambda *given: launched.append(given[0].shape) or launch(*given)
    )
    plain, _ = interval_attention.attend_ranges(q, k, v, None)
    with use_timings([FAST, SLOW]):
        interval_attention.attend_ranges(q, k, v, None)  # kernels are not asked for
        with use_kernels(True):
            ours, lse = interval_attention.attend_ranges(q, k, v, None)
            assert launched == [q.shape] and lse is None
            interval_attention.attend_ranges(*draw(40, 60), None)
            with torch.enable_grad():  # the way back was not measured
                interval_attention.attend_ranges(q.requires_grad_(), k, v, None)
    assert launched == [q.shape]
    assert_close(ours, plain)


def test_a_file_keeps_what_it_holds(tmp_path: Path):
    path = tmp_path / "times.json"
    record([FAST, SLOW], path)
    assert set(load(path)) == {FAST, SLOW}
    newer, other = replace(FAST, torch_ms=0.1), replace(FAST, capability=(9, 0))
    record([newer, other], path)
    assert set(load(path)) == {newer, other, SLOW}
    with use_timings(load(path)):
        q, k, _ = draw(9, 20)
        assert not kernel_is_faster(q, k)


def test_what_is_no_timing(tmp_path: Path):
    path = tmp_path / "times.json"
    good = asdict(FAST)
    wrong = [[good], {"capability": [9, 0]}, {**good, "torch_ms": 0}, {**good, "dtype": "int8"}, {**good, "tokens": 4}]
    for entry in wrong:
        path.write_text(json.dumps([entry]))
        with pytest.raises(ValueError, match=r"is no timing|measure it again"):
            load(path)
