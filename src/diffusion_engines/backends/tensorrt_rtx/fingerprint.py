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
        HardwareError: the library is missing, or does not know a compute capability; or plans that
            can be refitted are asked for where no GPU is.
    """
    trt = library()
    # 1.4, 1.6 and 1.7 end with cudaError 35 (no driver) then, of any network with weights.
    if target.build.weights != "embedded" and gpus.find_gpu() is None:
        raise HardwareError(
            "TensorRT-RTX builds plans that can be refitted only where an NVIDIA driver is",
            expected="a GPU, of any compute capability",
            found="no GPU that PyTorch sees",
            fix="build them on a machine with one, or set targets.*.build.weights=embedded\n"
            "(conf/target/)",
        )
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
