"""How many threads a program should give torch: one per core that this process may use.

A second thread on the same core gains nothing in matrix products, and threads beyond a container's quota only wait for
each other. The library never changes the number by itself; commands do, through `set_threads`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


@dataclass(frozen=True)
class Processors:
    """What this process may use: logical processors, the cores that they lie on, and a quota in processors, if any."""

    logical: int
    cores: int
    quota: float | None = None

    @property
    def threads(self) -> int:
        """One per core, and no more than the quota pays for."""
        return max(1, self.cores if self.quota is None else min(self.cores, int(self.quota)))


def find_processors(allowed: Collection[int] | None = None, root: Path = _ROOT) -> Processors:
    """Look them up; `allowed` are the numbers of logical processors, by default those of this process.

    Cores and quota are known on Linux alone, from the files below `root`.
    """
    if allowed is None:
        count = os.cpu_count() or 1
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(count)
    siblings = {
        number: _read(root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in allowed
    }
    return Processors(len(allowed), count_cores(siblings), _quota(root))


def set_threads(wanted: int | None = None) -> int:
    """Give torch so many threads, or without a number as many as `find_processors` says; returns the number.

    OMP_NUM_THREADS in the environment is somebody's choice and stays.
    """
    import torch

    if wanted is not None and wanted < 1:
        raise ValueError(f"threads is {wanted}; pass 1 or more, or leave it out")
    if wanted is None and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    count = wanted or find_processors().threads
    torch.set_num_threads(count)
    return count


def read_list(text: str) -> frozenset[int]:
    """Linux's lists of processors: "0-2,7" is 0, 1, 2 and 7."""
    ends = [part.partition("-")[::2] for part in text.strip().split(",") if part]
    return frozenset(number for first, last in ends for number in range(int(first), int(last or first) + 1))


def count_cores(siblings: dict[int, str | None]) -> int:
    """Cores under logical processors, from `thread_siblings_list` of each; one that has no such file is a core."""
    return len({frozenset((number,)) if text is None else read_list(text) for number, text in siblings.items()})


def read_quota(text: str) -> float | None:
    """`cpu.max` of cgroup v2, "200000 100000" for two processors; None for "max", no limit."""
    limit, _, period = text.strip().partition(" ")
    return None if limit == "max" else int(limit) / int(period or 100_000)


def read_old_quota(limit: str, period: str) -> float | None:
    """`cpu.cfs_quota_us` and `cpu.cfs_period_us` of cgroup v1; None for -1, no limit."""
    return int(limit) / int(period) if int(limit) > 0 else None


def cgroup_paths(text: str) -> dict[str, str]:
    """`/proc/self/cgroup` -> the path of this process in each hierarchy; that of v2 has no name."""
    lines = [line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2]
    return {name: path for _, names, path in lines for name in names.split(",")}


def _quota(root: Path) -> float | None:
    """The tightest limit of this process's groups and all groups around them."""
    paths = cgroup_paths(_read(root / "proc/self/cgroup") or "")
    found = []
    for path in _with_parents(paths.get("", "/")):
        text = _read(root / "sys/fs/cgroup" / path / "cpu.max")
        found += [] if text is None else [read_quota(text)]
    for path in _with_parents(paths.get("cpu", "/")):
        folder = root / "sys/fs/cgroup/cpu" / path
        limit, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        found += [] if limit is None or period is None else [read_old_quota(limit, period)]
    return min((quota for quota in found if quota is not None), default=None)


def _with_parents(path: str) -> list[str]:
    """A group and those around it, without the leading slash: within a container the path may be one of the host."""
    inside = PurePosixPath(path.lstrip("/"))
    return [str(part) for part in (inside, *inside.parents)]


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii")
    except OSError:  # no such file on this system, or none of ours
        return None
