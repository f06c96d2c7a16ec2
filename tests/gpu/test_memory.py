"""Memory on a GPU, as its driver counts it: `make test-gpu`."""

from __future__ import annotations

import ctypes
import time

import pytest
import torch

from diffusion_engines.bench.memory import peak_memory_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
GIB = 1 << 30


def allocate(pytorch: int, other: int) -> None:
    """Bytes through PyTorch's allocator, and past it, as engines take theirs."""
    kept = torch.empty(pytorch, dtype=torch.uint8, device="cuda")
    driver = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(other)) == 0
    time.sleep(0.2)  # as an engine does that runs
    del kept


def test_what_engines_allocate_counts() -> None:
    small, large = (
        peak_memory_of(allocate, GIB, GIB, gpu=True),
        peak_memory_of(allocate, GIB, 3 * GIB, gpu=True),
    )
    assert GIB <= small.gpu_pytorch < 1.1 * GIB
    assert small.gpu_pytorch == large.gpu_pytorch
    assert large.gpu - small.gpu == pytest.approx(2 * GIB, rel=0.05)
    assert 2 * GIB < small.gpu < 4 * GIB  # with the context
