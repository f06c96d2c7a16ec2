"""What engines of ONNX Runtime depend on: version, provider, instruction set or GPU."""

from __future__ import annotations

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
    return {**found, "instruction_set": cpu.instruction_set()}


def _gpu() -> Mapping[str, object]:
    gpu = gpus.any_gpu()
    import torch

    return {
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "cuda": torch.version.cuda,
    }
