"""ONNX Runtime: CPUs everywhere, NVIDIA GPUs where onnxruntime-gpu is installed.

An engine is the graph after ONNX Runtime's own optimizations, saved. From level "all" on it
contains layouts that fit one instruction set, hence the fingerprint.
https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html
"""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines import cpu
from diffusion_engines.backends import BuildResult, require
from diffusion_engines.backends.preflight import recorded
from diffusion_engines.config import OnnxRuntimeTarget
from diffusion_engines.errors import BuildError, ConfigError, FingerprintError, HardwareError

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("fp32", "fp16", "fp16-mixed", "fp8", "int8")
ENGINE = "engine.onnx"
_DATA = "engine.onnx.data"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def fingerprint(target: OnnxRuntimeTarget) -> dict[str, Any]:
    """Return what an engine depends on: version, provider, instruction set or GPU.

    Raises:
        HardwareError: onnxruntime, or its CUDA provider, or the GPU, is missing.
    """
    ort = _onnxruntime(target.device)
    found: dict[str, Any] = {"onnxruntime": ort.__version__, "device": target.device}
    if target.device == "cuda":
        return found | _gpu()
    return found | {"instruction_set": instruction_set()}


def wrap_fingerprint(target: OnnxRuntimeTarget) -> dict[str, Any]:
    """Wrapping copies files, and depends on nothing."""
    return {}


def wrap(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Add nothing: the bundle's files are the engine's."""
    return {}


def _onnxruntime(device: str) -> Any:
    package = "onnxruntime-gpu" if device == "cuda" else "onnxruntime"
    ort = require("onnxruntime", f"pip install {package}")
    if _PROVIDERS[device] not in ort.get_available_providers():
        raise HardwareError(
            f"this ONNX Runtime cannot run on {device}",
            expected=_PROVIDERS[device],
            found=", ".join(ort.get_available_providers()),
            fix="install the extra `[cuda]` on a machine with an NVIDIA GPU: it has\n"
            "onnxruntime-gpu, which replaces onnxruntime",
        )
    if device == "cuda":
        ort.preload_dlls()  # CUDA's libraries as PyTorch's wheels bring them
    return ort


def _session(ort: Any, path: Path, options: Any, device: str, *, tf32: bool) -> Any:
    """Open a session that really runs on ``device``, in TF32 only if asked to.

    Raises:
        HardwareError: ONNX Runtime fell back to the CPU, which it does with a warning alone.
    """
    provider = _PROVIDERS[device]
    # CUDA's default is TF32: an "fp32" VAE decoder then differs by 7e-4 from PyTorch's.
    settings = {"use_tf32": str(int(tf32))} if device == "cuda" else {}
    session = ort.InferenceSession(path, options, providers=[(provider, settings)])
    if provider not in session.get_providers():
        raise HardwareError(
            f"ONNX Runtime {ort.__version__} could not start on {device}",
            expected=provider,
            found=", ".join(session.get_providers()),
            fix="its message is above: most often CUDA's or cuDNN's libraries are missing or of\n"
            "another major version than it was built with",
        )
    return session


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


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise HardwareError(
            "no CUDA GPU", expected="a GPU that PyTorch sees", found="none", fix="check nvidia-smi"
        )
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
    }


def build(
    onnx: Path,
    folder: Path,
    target: OnnxRuntimeTarget,
    inputs: list[dict[str, Any]],
    precision: str,
) -> BuildResult:
    """Optimize a graph for the target and save it as ``engine.onnx`` with external data.

    ONNX Runtime's CPU kernels are fp32: an fp16 graph gets casts around them, and with
    optimizations most of its weights are stored cast. The dtypes in the result show it.

    Raises:
        BuildError: ONNX Runtime refused the graph.
    """
    ort = _onnxruntime(target.device)
    options = ort.SessionOptions()
    options.graph_optimization_level = _level(ort, target.build.optimization_level)
    options.optimized_model_filepath = str(folder / ENGINE)
    options.log_severity_level = 3
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", _DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        # From opset 21 on, turning int8 into uint8 forgets the attribute that names the type, and
        # the graph of its own making is refused (1.32).
        ("session.qdqisint8allowed", "1"),
        ("session.disable_prepacking", "1"),  # packing is for running; here it costs memory
    ):
        options.add_session_config_entry(key, value)
    try:
        _session(ort, onnx, options, target.device, tf32=target.build.tf32)
    except HardwareError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise BuildError(
            f"ONNX Runtime {ort.__version__} refused {onnx}",
            found=str(error)[:800],
            fix="try export.exporter=dynamo, or a lower export.opset",
        ) from error
    layers, precisions = _layers(folder / ENGINE)
    return BuildResult(ENGINE, f"onnxruntime {ort.__version__}", "", layers, precisions)


def _level(ort: Any, name: str) -> Any:
    return getattr(
        ort.GraphOptimizationLevel,
        {
            "disabled": "ORT_DISABLE_ALL",
            "basic": "ORT_ENABLE_BASIC",
            "extended": "ORT_ENABLE_EXTENDED",
            "all": "ORT_ENABLE_ALL",
        }[name],
    )


def _layers(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    import onnx

    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    graph = onnx.load(path, load_external_data=False).graph
    weights = Counter(names[i.data_type] for i in graph.initializer if i.data_type in names)
    return dict(Counter(node.op_type for node in graph.node)), dict(weights)


def check_loadable(manifest: dict[str, Any]) -> None:
    """Compare an engine's fingerprint with this machine.

    Raises:
        FingerprintError: they differ.
        HardwareError: onnxruntime is missing.
    """
    ort = _onnxruntime(recorded(manifest, "fingerprint", "device"))
    here = {"onnxruntime": ort.__version__}
    if manifest["fingerprint"]["device"] == "cuda":
        here |= _gpu()
    else:
        here["instruction_set"] = instruction_set()
    for key, value in here.items():
        if (built := recorded(manifest, "fingerprint", key)) != value:
            raise FingerprintError(
                f"the engine {manifest['name']} was built for another {key.replace('_', ' ')}",
                expected=str(built),
                found=str(value),
                fix=f"build it here: `dvc repro build@{manifest['name']}`",
            )


def load(
    folder: Path, manifest: dict[str, Any], device: str, *, cuda_graph: bool = False
) -> nn.Module:
    """Return the engine as a module that takes and returns tensors on ``device``.

    Raises:
        ConfigError: a CUDA graph is asked for.
    """
    import torch

    if cuda_graph:
        raise ConfigError(
            "engines of ONNX Runtime do not run in a CUDA graph here",
            expected="cuda_graph=False, or a TensorRT engine",
            found="cuda_graph=True",
        )
    provider = manifest["fingerprint"]["device"]
    ort = _onnxruntime(provider)
    options = ort.SessionOptions()
    # The file is optimized already. Another pass would only cost time.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    tf32 = provider == "cuda" and recorded(manifest, "settings", "build", "tf32")
    session = _session(ort, folder / manifest["engine"], options, provider, tf32=tf32)

    class OnnxRuntimeEngine(torch.nn.Module):
        """Runs a session on tensors in place; casts inputs to the dtypes of the graph."""

        def __init__(self) -> None:
            super().__init__()
            self.inputs = [(i.name, _torch_dtype(i.type)) for i in session.get_inputs()]
            self.outputs = sorted(value.name for value in session.get_outputs())

        def forward(self, *tensors: torch.Tensor) -> Any:
            binding = session.io_binding()
            # Held until the run is over: the session has only their addresses.
            held = [
                tensor.to(provider, dtype).contiguous()
                for tensor, (_, dtype) in zip(tensors, self.inputs, strict=True)
            ]
            for tensor, (name, dtype) in zip(held, self.inputs, strict=True):
                binding.bind_input(
                    name, provider, 0, _numpy_dtype(dtype), tuple(tensor.shape), tensor.data_ptr()
                )
            for name in self.outputs:
                binding.bind_output(name, provider)
            if provider == "cuda":  # the session has a stream of its own
                torch.cuda.current_stream().synchronize()
            session.run_with_iobinding(binding)
            outputs = tuple(map(torch.utils.dlpack.from_dlpack, binding.get_outputs()))
            return outputs[0] if len(outputs) == 1 else outputs

    return OnnxRuntimeEngine()


def _torch_dtype(name: str) -> Any:
    import torch

    return {
        "tensor(float)": torch.float32,
        "tensor(float16)": torch.float16,
        "tensor(int64)": torch.int64,
    }[name]


def _numpy_dtype(dtype: Any) -> Any:
    import numpy as np

    return getattr(np, str(dtype).removeprefix("torch."))
