"""TensorRT for RTX: engines for GeForce and professional RTX GPUs, built without a GPU.

The compute capabilities are named in the target, so that one machine builds for a whole fleet.
The runtime compiles its last stage on the user's GPU when an engine is first loaded.
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffusion_engines.backends import BuildResult, check_dtypes, require
from diffusion_engines.config import TensorRTRTXTarget
from diffusion_engines.errors import BuildError, FingerprintError, HardwareError
from diffusion_engines.progress import progress

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("fp32", "fp16", "bf16", "fp16-mixed", "fp8", "int8")
ENGINE = "engine.plan"
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_TILING = {"none": "NONE", "fast": "FAST", "moderate": "MODERATE", "full": "FULL"}
_PRECISION_OF_DTYPE = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT8": "int8",
    "FP8": "fp8",
}


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
        "platform": f"{platform.system()}-{platform.machine()}".lower(),
    }


def _tensorrt_rtx() -> Any:
    return require("tensorrt_rtx", "pip install tensorrt-rtx")


def _capability(trt: Any, name: str) -> Any:
    value = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}", None)
    if value is None:
        raise HardwareError(
            f"TensorRT-RTX {trt.__version__} has no compute capability {name}",
            expected=", ".join(COMPUTE_CAPABILITIES),
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
    logger = _recording_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildError(
            f"TensorRT-RTX {trt.__version__} could not parse {onnx}",
            found="\n".join(f"{e.node_name()}: {e.desc()}" for e in errors[:5]),
            fix="try export.exporter=dynamo, or another export.opset",
        )
    config = _builder_config(trt, builder, target)
    if (profile := _profile(builder, inputs)) is not None:
        config.add_optimization_profile(profile)
    layers, precisions = _layers(network)
    check_dtypes(onnx, precision, precisions)

    path = folder / ENGINE
    with path.open("wb") as file:
        # Streamed: the plan never lies in memory as a whole (1.7 GB for the UNet of SD 1.4).
        ok = builder.build_serialized_network_to_stream(network, config, _stream_writer(trt, file))
    if not ok or path.stat().st_size == 0:
        raise BuildError(
            f"TensorRT-RTX {trt.__version__} failed to build {onnx}",
            found="\n".join(logger.lines[-12:]) or "no message",
            fix="the log above names the layer; more memory is the other usual cause",
        )
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
    config.progress_monitor = _progress_monitor(trt)
    return config


def _profile(builder: Any, inputs: list[dict[str, Any]]) -> Any | None:
    """Return the optimization profile of the open dimensions, or None where all are fixed."""
    if not any(isinstance(dim, dict) for value in inputs for dim in value["shape"]):
        return None
    profile = builder.create_optimization_profile()
    for value in inputs:
        if any(isinstance(dim, dict) for dim in value["shape"]):
            shapes = [
                tuple(dim[key] if isinstance(dim, dict) else dim for dim in value["shape"])
                for key in ("min", "size", "max")
            ]
            profile.set_shape(value["name"], *shapes)
    return profile


def _layers(network: Any) -> tuple[dict[str, int], dict[str, int]]:
    types: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        types[layer.type.name] += 1
        for output in range(layer.num_outputs):
            dtype = layer.get_output(output).dtype.name
            if dtype in _PRECISION_OF_DTYPE:
                precisions[_PRECISION_OF_DTYPE[dtype]] += 1
    return dict(types), dict(precisions)


def _recording_logger(trt: Any) -> Any:
    class RecordingLogger(trt.ILogger):
        """Keeps every message for the build log."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                self.lines.append(f"[{severity.name}] {message}")

    return RecordingLogger()


def _stream_writer(trt: Any, file: Any) -> Any:
    class FileWriter(trt.IStreamWriter):
        """Writes the plan to a file as it is produced."""

        def write(self, data: bytes) -> int:
            return file.write(data)

    return FileWriter()


def _progress_monitor(trt: Any) -> Any:
    class ProgressMonitor(trt.IProgressMonitor):
        """Shows the builder's phases as progress bars."""

        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, tqdm[Any]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.bars[phase_name] = progress((), phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.bars:
                self.bars[phase_name].update()
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.bars:
                self.bars.pop(phase_name).close()

    return ProgressMonitor()


def check_loadable(manifest: dict[str, Any]) -> None:
    """Compare an engine's fingerprint with this machine, before TensorRT-RTX sees the engine.

    Raises:
        HardwareError: the library or a GPU is missing.
        FingerprintError: another library version or compute capability than the engine's.
    """
    import torch

    trt = _tensorrt_rtx()
    built = manifest["fingerprint"]
    if trt.__version__ != built["tensorrt_rtx"]:
        raise FingerprintError(
            f"the engine {manifest['name']} was built by another TensorRT-RTX",
            expected=built["tensorrt_rtx"],
            found=trt.__version__,
            fix=f"pip install tensorrt-rtx=={built['tensorrt_rtx']}, or build it with this one:\n"
            f"`dvc repro build@{manifest['name']}`",
        )
    if not torch.cuda.is_available():
        raise HardwareError(
            f"the engine {manifest['name']} needs an NVIDIA GPU to run",
            expected="compute capability " + " or ".join(built["compute_capabilities"]),
            found="no GPU that PyTorch sees",
            fix="run it on such a GPU; building and wrapping need none",
        )
    found = ".".join(map(str, torch.cuda.get_device_capability()))
    if found not in built["compute_capabilities"]:
        raise FingerprintError(
            f"the engine {manifest['name']} was built for another GPU",
            expected="compute capability " + " or ".join(built["compute_capabilities"]),
            found=f"{found} ({torch.cuda.get_device_name()})",
            fix=f"add '{found}' to the target's compute_capabilities and run `dvc repro`"
            if found in COMPUTE_CAPABILITIES
            else "TensorRT-RTX does not run on this GPU: use the backend tensorrt or onnxruntime",
        )


def load(folder: Path, manifest: dict[str, Any], device: str) -> nn.Module:
    """Return the engine as a module on a GPU, running on PyTorch's current stream."""
    import torch

    trt = _tensorrt_rtx()
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine((folder / manifest["engine"]).read_bytes())
    if engine is None:
        raise BuildError(
            f"TensorRT-RTX could not load {folder / manifest['engine']}",
            fix=f"build it again: `dvc repro --force build@{manifest['name']}`",
        )
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = sorted(n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
    output = next(n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
    dtypes = {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.bfloat16: torch.bfloat16,
        trt.int64: torch.int64,
        trt.int32: torch.int32,
    }

    class TensorRTRTXEngine(torch.nn.Module):
        """Binds the tensors' addresses, and casts inputs to the dtypes of the engine."""

        def __init__(self) -> None:
            super().__init__()
            self.runtime, self.engine, self.context = runtime, engine, context

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            held = [
                tensor.to(device, dtypes[engine.get_tensor_dtype(name)]).contiguous()
                for tensor, name in zip(tensors, inputs, strict=True)
            ]
            for tensor, name in zip(held, inputs, strict=True):
                context.set_input_shape(name, tuple(tensor.shape))
                context.set_tensor_address(name, tensor.data_ptr())
            result = torch.empty(
                tuple(context.get_tensor_shape(output)),
                dtype=dtypes[engine.get_tensor_dtype(output)],
                device=device,
            )
            context.set_tensor_address(output, result.data_ptr())
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError(f"the engine {manifest['name']} failed to run")
            return result

    return TensorRTRTXEngine()
