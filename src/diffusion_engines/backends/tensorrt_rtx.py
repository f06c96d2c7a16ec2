"""TensorRT for RTX: engines for GeForce and professional RTX GPUs, built without a GPU.

The compute capabilities are named in the target, so that one machine builds for a whole fleet.
The runtime compiles its last stage on the user's GPU when an engine is first loaded.
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.backends import BuildResult, check_dtypes, require
from diffusion_engines.backends.gpus import RTX_CAPABILITIES
from diffusion_engines.backends.plans.building import (
    add_profile,
    layers_of_network,
    parse_graph,
    recording_logger,
    write_plan,
)
from diffusion_engines.backends.preflight import (
    check_platform,
    foreign_gpu,
    platform_name,
    rebuild,
    recorded,
    require_gpu,
)
from diffusion_engines.config import TensorRTRTXTarget
from diffusion_engines.errors import FingerprintError, HardwareError

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("fp32", "fp16", "bf16", "fp16-mixed", "fp8", "int8")
ENGINE = "engine.plan"
_TILING = {"none": "NONE", "fast": "FAST", "moderate": "MODERATE", "full": "FULL"}


def fingerprint(target: TensorRTRTXTarget) -> dict[str, Any]:
    """Return what an engine depends on: the library's version, and the GPUs asked for.

    Raises:
        HardwareError: the library is missing, or does not know a compute capability.
    """
    trt = _tensorrt_rtx()
    for capability in target.compute_capabilities:
        _capability(trt, capability)
    return {
        "tensorrt_rtx": trt.__version__,
        "compute_capabilities": sorted(target.compute_capabilities),
        "platform": platform_name(),
    }


def wrap_fingerprint(target: TensorRTRTXTarget) -> dict[str, Any]:
    """Return what the TorchScript file depends on; nothing where none is asked for.

    Raises:
        HardwareError: torch-tensorrt-rtx is missing.
    """
    from diffusion_engines.backends.plans import torchscript

    return torchscript.wrap_fingerprint("tensorrt_rtx", target.torchscript)


def _tensorrt_rtx() -> Any:
    return require("tensorrt_rtx", "pip install tensorrt-rtx")


def _capability(trt: Any, name: str) -> Any:
    value = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}", None)
    if value is None:
        raise HardwareError(
            f"TensorRT-RTX {trt.__version__} has no compute capability {name}",
            expected=", ".join(RTX_CAPABILITIES),
            found=name,
            fix="correct targets.*.compute_capabilities in conf/target/; data-centre GPUs such as\n"
            "H100 (9.0) need the backend tensorrt",
        )
    return value


def build(
    onnx: Path,
    folder: Path,
    target: TensorRTRTXTarget,
    inputs: list[dict[str, Any]],
    precision: str,
) -> BuildResult:
    """Build ``engine.plan`` from a graph, for every compute capability of the target.

    The network is strongly typed: every layer runs in the precision that the graph says.

    Args:
        onnx: the graph.
        folder: gets the engine.
        target: builder settings.
        inputs: name and shape of each input; open dimensions as ``{size, min, max}``.
        precision: that most layers must have.

    Raises:
        BuildError: TensorRT-RTX refused the graph, or failed, or would run it in another precision.
    """
    trt = _tensorrt_rtx()
    library = f"TensorRT-RTX {trt.__version__}"
    logger = recording_logger(trt)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    builder, network = parse_graph(trt, library, onnx, logger, flags)
    config = _builder_config(trt, builder, target)
    add_profile(builder, config, inputs)
    layers, precisions = layers_of_network(network)
    check_dtypes(onnx, precision, precisions)
    write_plan(trt, library, builder, network, config, folder / ENGINE, logger, onnx)
    return BuildResult(
        ENGINE, f"tensorrt_rtx {trt.__version__}", "\n".join(logger.lines), layers, precisions
    )


def _builder_config(trt: Any, builder: Any, target: TensorRTRTXTarget) -> Any:
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(target.compute_capabilities)
    for index, name in enumerate(target.compute_capabilities):
        config.set_compute_capability(_capability(trt, name), index)
    settings = target.build
    if settings.max_aux_streams is not None:
        config.max_aux_streams = settings.max_aux_streams
    config.tiling_optimization_level = getattr(
        trt.TilingOptimizationLevel, _TILING[settings.tiling_optimization_level]
    )
    config.profiling_verbosity = getattr(
        trt.ProfilingVerbosity, settings.profiling_verbosity.upper()
    )
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # the builder has it on
    return config


def check_loadable(manifest: dict[str, Any]) -> None:
    """Compare an engine's fingerprint with this machine, before TensorRT-RTX sees the engine.

    Raises:
        IntegrityError: the manifest has no complete fingerprint.
        HardwareError: the library or a GPU is missing.
        FingerprintError: another library version, platform or compute capability.
    """
    built = recorded(manifest, "fingerprint", "tensorrt_rtx")
    capabilities = recorded(manifest, "fingerprint", "compute_capabilities")
    check_platform(manifest)
    trt = _tensorrt_rtx()
    if trt.__version__ != built:
        raise FingerprintError(
            f"the engine {manifest['name']} was built by another TensorRT-RTX",
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
            hint = (
                f"or add '{gpu.capability}' to compute_capabilities of {manifest['name']}'s target"
            )
        raise foreign_gpu(manifest, expected, gpu, hint)


def wrap(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the TorchScript file where the target asks for one; return what loading it depends on.

    Raises:
        as :func:`check_loadable` and ``torchscript.wrap_plan``.
    """
    from diffusion_engines.backends.plans import torchscript

    if not manifest.get("settings", {}).get("torchscript"):
        return {}
    check_loadable(manifest)
    return torchscript.wrap_plan(folder, manifest, "tensorrt_rtx")


def load(
    folder: Path, manifest: dict[str, Any], device: str, *, cuda_graph: bool = False
) -> nn.Module:
    """Return the engine as a module on a GPU, running on PyTorch's current stream."""
    from diffusion_engines.backends.plans.running import load_plan

    return load_plan(
        _tensorrt_rtx(),
        folder / manifest["engine"],
        manifest["name"],
        device,
        cuda_graph=cuda_graph,
    )
