"""Counting cores and quotas from what Linux says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaleweaver.threads import (
    Processors,
    cgroup_paths,
    count_cores,
    find_processors,
    read_list,
    read_old_quota,
    read_quota,
    set_threads,
)


def machine(root: Path, siblings: dict[int, str], files: dict[str, str]) -> Path:
    named = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": text for n, text in siblings.items()}
    for name, text in {**named, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_lists_of_processors():
    assert read_list("0-2,7\n") == {0, 1, 2, 7} and read_list("5") == {5} and read_list("\n") == set()


def test_two_threads_of_a_core_are_one_core():
    assert count_cores({0: "0,4\n", 1: "1,5\n", 4: "0,4\n", 5: "1,5\n"}) == 2
    assert count_cores({0: None, 1: None}) == 2


@pytest.mark.parametrize(
    "text, quota", [("max 100000\n", None), ("200000 100000\n", 2.0), ("150000 100000", 1.5), ("50000", 0.5)]
)
def test_quota_of_the_second_version(text, quota):
    assert read_quota(text) == quota


def test_quota_of_the_first_version():
    assert read_old_quota("-1\n", "100000\n") is None and read_old_quota("400000\n", "100000\n") == 4


def test_groups_of_a_process():
    assert cgroup_paths("0::/user.slice/a:b\n") == {"": "/user.slice/a:b"}
    assert cgroup_paths("5:cpu,cpuacct:/docker/x\n1:name=systemd:/\n")["cpu"] == "/docker/x"


def test_affinity_decides_which_processors_count(tmp_path):
    root = machine(tmp_path, {n: f"{n % 4},{n % 4 + 4}\n" for n in range(8)}, {})
    assert find_processors(range(8), root) == Processors(8, 4)
    assert find_processors([0, 4, 1], root).threads == 2


def test_the_tightest_group_around_a_process_limits_it(tmp_path):
    files = {
        "proc/self/cgroup": "0::/pod/task\n",
        "sys/fs/cgroup/pod/task/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pod/cpu.max": "250000 100000\n",
    }
    found = find_processors(range(8), machine(tmp_path, {}, files))
    assert found.quota == 2.5 and found.threads == 2


def test_an_old_group_limits_too(tmp_path):
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert find_processors(range(8), machine(tmp_path, {}, files)).threads == 1


def test_this_machine_has_a_thread():
    found = find_processors()
    assert 1 <= found.threads <= found.cores <= found.logical


def test_threads_are_set_when_asked(monkeypatch):
    import torch

    before, found = torch.get_num_threads(), find_processors().threads
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        assert set_threads(found + 1) == found + 1 == torch.get_num_threads()
        assert set_threads() == found == torch.get_num_threads()
        torch.set_num_threads(found + 1)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert set_threads() == found + 1 == torch.get_num_threads()  # somebody has chosen
        with pytest.raises(ValueError, match="1 or more"):
            set_threads(0)
    finally:
        torch.set_num_threads(before)
