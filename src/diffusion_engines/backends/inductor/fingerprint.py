"""What engines of PyTorch's compiler depend on: PyTorch, the C++ compiler, the CPU or the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

import torch

from diffusion_engines import cpu
from diffusion_engines.backends import gpus
from diffusion_engines.backends.inductor.building.compiler import find_compiler
from diffusion_engines.backends.preflight import platform_name


def fingerprint_of(device: str) -> Mapping[str, object]:
    """Return what building for ``cpu`` or ``cuda`` depends on.

    Raises:
        HardwareError: the GPU, the driver's tools or a working C++ compiler is missing.
    """
    found = {**running_fingerprint(device), "compiler": find_compiler(device).version}
    if device == "cuda":
        return {**found, "driver": gpus.driver_branch(), "triton": metadata.version("triton")}
    return found


def running_fingerprint(device: str) -> Mapping[str, str]:
    """Return the part that running depends on: a server needs no compiler.

    Raises:
        HardwareError: there is no GPU for ``cuda``.
    """
    found = {
        "torch": torch.__version__.split("+")[0],
        "platform": platform_name(),
        "device": device,
    }
    if device == "cpu":
        return {**found, "instruction_set": cpu.instruction_set()}
    gpu = gpus.any_gpu()
    return {
        **found,
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "cuda": str(torch.version.cuda),
    }
