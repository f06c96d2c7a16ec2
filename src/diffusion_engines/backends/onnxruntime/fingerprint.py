"""What engines of ONNX Runtime depend on: version, provider, instruction set or GPU."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from diffusion_engines import cpu
from diffusion_engines.backends import gpus
from diffusion_engines.backends.onnxruntime.session import library


def fingerprint_of(device: str) -> Mapping[str, object]:
    """Return what an engine for ``cpu`` or ``cuda`` depends on.

    Raises:
        HardwareError: onnxruntime, or its CUDA provider, or the GPU, is missing.
    """
    found = {"onnxruntime": library(device).__version__, "device": device}
    if device == "cuda":
        return {**found, **_gpu()}
    return {**found, "instruction_set": instruction_set()}


def instruction_set() -> str:
    """Return the CPU's instruction set, as coarse as code generation needs it.

    x86-64 is told apart by its micro-architecture levels (v2: SSE4.2, v3: AVX2, v4: AVX-512), so
    that two laptops of about the same age share engines.
    """
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return machine
    flags = cpu.this_cpu().flags
    levels = (
        ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
        ("x86-64-v3", {"avx2", "bmi2", "fma"}),
        ("x86-64-v2", {"sse4_2", "ssse3"}),
    )
    return next((level for level, needed in levels if needed <= flags), "x86-64")


def _gpu() -> Mapping[str, object]:
    gpu = gpus.any_gpu()
    import torch

    return {
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "cuda": torch.version.cuda,
    }
