"""What TensorRT engines depend on: TensorRT, CUDA, the driver's branch, the GPU."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_engines.backends import gpus
from diffusion_engines.backends.preflight import platform_name
from diffusion_engines.backends.tensorrt.building.trtexec import find_trtexec, format_version
from diffusion_engines.backends.tensorrt.building.versions import builder_version
from diffusion_engines.backends.tensorrt.settings import TensorRTTarget
from diffusion_engines.errors import HardwareError


def fingerprint_of(target: TensorRTTarget) -> Mapping[str, object]:
    """Return what an engine depends on.

    Raises:
        HardwareError: TensorRT or its GPU is not here.
    """
    gpu = gpu_of(target)
    import torch

    return {
        "tensorrt": format_version(builder_version(find_trtexec())),
        "cuda": torch.version.cuda,
        "driver": gpus.driver_branch(),
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "platform": platform_name(),
    }


def gpu_of(target: TensorRTTarget) -> gpus.Gpu:
    """Return the GPU of this machine where it is the target's.

    Raises:
        HardwareError: it is another one, or there is none.
    """
    gpu = gpus.find_gpu()
    wanted = f"{target.gpu}, compute capability {target.compute_capability}"
    if gpu is None or gpu.capability != target.compute_capability or not gpu.is_a(target.gpu):
        raise HardwareError(
            f"TensorRT builds for the GPU that it runs on, and this is not the {target.gpu} of the "
            "target",
            expected=wanted,
            found=str(gpu) if gpu else "no GPU that PyTorch sees",
            fix="run this on such a machine; in a container, start it with `--gpus all`",
        )
    return gpu
