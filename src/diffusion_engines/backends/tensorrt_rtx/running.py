"""Run a plan of TensorRT-RTX, after comparing its fingerprint with this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.backends.preflight import (
    check_platform,
    foreign_gpu,
    rebuild,
    recorded,
    require_gpu,
)
from diffusion_engines.backends.tensorrt_rtx.building import library
from diffusion_engines.backends.tensorrt_rtx.settings import RTX_CAPABILITIES
from diffusion_engines.errors import FingerprintError
from diffusion_engines.manifests import Bundle, Engine

if TYPE_CHECKING:
    from torch import nn


def check_loadable(manifest: Engine) -> None:
    """Compare an engine's fingerprint with this machine, before TensorRT-RTX sees the engine.

    Raises:
        IntegrityError: the manifest has no complete fingerprint.
        HardwareError: the library or a GPU is missing.
        FingerprintError: another library version, platform or compute capability.
    """
    built = recorded(manifest, "fingerprint", "tensorrt_rtx", str)
    capabilities = recorded(manifest, "fingerprint", "compute_capabilities", list)
    check_platform(manifest)
    trt = library()
    if trt.__version__ != built:
        raise FingerprintError(
            f"the engine {manifest.name} was built by another TensorRT-RTX",
            expected=built,
            found=trt.__version__,
            fix=f"`pip install tensorrt-rtx=={built}`, or build it with this one:\n"
            f"{rebuild(manifest)}",
        )
    expected = "compute capability " + " or ".join(capabilities)
    gpu = require_gpu(manifest, expected)
    if gpu.capability not in capabilities:
        hint = "TensorRT-RTX does not run on this GPU: use the backend tensorrt or onnxruntime"
        if gpu.capability in RTX_CAPABILITIES:
            hint = f"or add '{gpu.capability}' to compute_capabilities of {manifest.name}'s target"
        raise foreign_gpu(manifest, expected, gpu, hint)


def load(folder: Path, manifest: Engine, device: str, *, cuda_graph: bool = False) -> nn.Module:
    """Return the engine as a module on a GPU, in the order of PyTorch's current stream.

    What the library compiles for this GPU is kept (``kernels.py``), and CUDA graphs are its own. A
    stripped engine is given the weights of its bundle.

    Raises:
        BuildError: the runtime refused the plan, or the plan the weights.
    """
    from diffusion_engines.backends.nvidia.refitting import refit_at_load
    from diffusion_engines.backends.nvidia.running import load_plan
    from diffusion_engines.backends.tensorrt_rtx.kernels import contexts_with_kernels, kernels_of

    trt = library()
    kernels = kernels_of(trt, manifest) if isinstance(manifest, Bundle) else None
    return load_plan(
        trt,
        folder / manifest.engine,
        manifest.name,
        device,
        cuda_graph=cuda_graph,
        prepare=refit_at_load(trt, folder, manifest),
        contexts=contexts_with_kernels(trt, kernels, cuda_graph=cuda_graph),
    )
