"""Who computes: the kernel or its reference."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from scaleweaver.kernels.dispatch import runs_kernel, use_kernels


def test_cpu_tensors_get_the_reference_unless_forced():
    x = torch.zeros(2)
    assert not runs_kernel(x)
    with use_kernels(True):
        assert runs_kernel(x)
        with use_kernels(False):
            assert not runs_kernel(x)
        assert runs_kernel(x)
        assert not torch.compile(runs_kernel, backend="eager")(x)  # the compiler gets torch to fuse
    with pytest.raises(KeyError), use_kernels(True):
        raise KeyError
    assert not runs_kernel(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_get_the_kernel(monkeypatch):
    x = torch.zeros(2, device="cuda")
    assert not runs_kernel(x)
    monkeypatch.setenv("SCALEWEAVER_KERNELS", "1")
    assert runs_kernel(x) == (torch.cuda.get_device_capability() >= (8, 0)) and not runs_kernel(x.double())


def test_triton_is_imported_by_the_first_launch_alone():
    code = (
        "import sys\n"
        "from scaleweaver.kernels import bit_sampling, dispatch, gate_norm, interval_attention, qkv_rope\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
