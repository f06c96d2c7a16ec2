"""Run an engine of ONNX Runtime, after comparing its fingerprint with this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.backends.onnxruntime.fingerprint import fingerprint_of
from diffusion_engines.backends.onnxruntime.session import library, open_session
from diffusion_engines.backends.preflight import rebuild, recorded
from diffusion_engines.backends.targets import recorded_device
from diffusion_engines.cpu import usable_cores
from diffusion_engines.errors import (
    ConfigError,
    FingerprintError,
    HardwareError,
    IntegrityError,
)
from diffusion_engines.manifests import Engine
from diffusion_engines.names import trailing_number

if TYPE_CHECKING:
    from torch import nn


def check_loadable(manifest: Engine) -> None:
    """Compare an engine's fingerprint with this machine.

    Raises:
        FingerprintError: they differ.
        HardwareError: onnxruntime is missing.
    """
    for key, value in fingerprint_of(recorded_device(manifest)).items():
        if (built := recorded(manifest, "fingerprint", key, str)) != value:
            raise FingerprintError(
                f"the engine {manifest.name} was built for another {key.replace('_', ' ')}",
                expected=str(built),
                found=str(value),
                fix=f"build it here: {rebuild(manifest)}",
            )


def load(
    folder: Path, manifest: Engine, *, cuda_graph: bool = False, threads: int | None = None
) -> nn.Module:
    """Return the engine as a module that takes and returns tensors on the device of its build.

    Several threads can call it at once.

    Raises:
        ConfigError: a CUDA graph is asked for.
        IntegrityError: ONNX Runtime cannot load the engine.
    """
    import torch

    if cuda_graph:
        raise ConfigError(
            "engines of ONNX Runtime do not run in a CUDA graph here",
            expected="cuda_graph=False, or a TensorRT engine",
            found="cuda_graph=True",
        )
    provider = recorded_device(manifest)
    ort = library(provider)
    options = ort.SessionOptions()
    # The file is optimized already. Another pass would only cost time.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # A number of its own choice would pin them to the machine's cores, allowed or not.
    options.intra_op_num_threads = threads or usable_cores()
    tf32 = provider == "cuda" and recorded(manifest, "settings", "build.tf32", bool)
    path = folder / manifest.engine
    try:
        session = open_session(ort, path, options, provider, tf32=tf32)
    except HardwareError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise IntegrityError(
            f"ONNX Runtime {ort.__version__} cannot load {path}",
            expected="an engine and its data, as a build of this version wrote them",
            found=str(error)[:800],
            fix=f"build it again: {rebuild(manifest)}",
        ) from error

    class OnnxRuntimeEngine(torch.nn.Module):
        """Runs a session on tensors in place; casts inputs to the dtypes of the graph."""

        def __init__(self) -> None:
            super().__init__()
            inputs = sorted(session.get_inputs(), key=lambda value: trailing_number(value.name))
            outputs = (value.name for value in session.get_outputs())
            self.inputs = [(value.name, _torch_dtype(value.type)) for value in inputs]
            self.outputs = sorted(outputs, key=trailing_number)

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
