"""What TensorRT-RTX engines depend on: the library's version, and the GPUs asked for."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_engines.backends import gpus
from diffusion_engines.backends.preflight import platform_name
from diffusion_engines.backends.tensorrt_rtx.building import capability_of, library
from diffusion_engines.backends.tensorrt_rtx.settings import TensorRTRTXTarget
from diffusion_engines.errors import HardwareError


def fingerprint_of(target: TensorRTRTXTarget) -> Mapping[str, object]:
    """Return what an engine depends on.

    Raises:
        HardwareError: the library is missing, or does not know a compute capability.
    """
    trt = library()
    for capability in target.compute_capabilities:
        capability_of(trt, capability)
    return {
        "tensorrt_rtx": trt.__version__,
        "compute_capabilities": sorted(target.compute_capabilities),
        "platform": platform_name(),
    }


def check_gpu(target: TensorRTRTXTarget) -> None:
    """Ask whether this machine's GPU is of one of the target's compute capabilities.

    Raises:
        HardwareError: it is not.
    """
    gpu = gpus.find_gpu()
    if gpu is None or gpu.capability not in target.compute_capabilities:
        raise HardwareError(
            "this machine has no GPU that the target's engines run on",
            expected="compute capability " + " or ".join(target.compute_capabilities),
            found=str(gpu) if gpu else "no GPU that PyTorch sees",
            fix="run this on such a machine; in a container, start it with `--gpus all`",
        )
