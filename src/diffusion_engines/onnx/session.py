"""Run a graph in ONNX Runtime on the CPU, as it is written and with little memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from diffusion_engines.errors import ExportError
from diffusion_engines.names import trailing_number

# By its own name: `quantize` puts `lean_options` in its place while ModelOpt makes sessions.
_SessionOptions = onnxruntime.SessionOptions

NUMPY = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}


def lean_options() -> Any:
    """Return options for a graph as it is written, in little memory."""
    options = _SessionOptions()
    # As written, so that two graphs are compared and not two optimizations of them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # Memory: no second copy of the weights, and casts of fp16 weights when they are needed
    # instead of all of them first (5.3 instead of 6.2 GB for the UNet of SD 1.4).
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return options


def session_of(path: Path) -> Any:
    """Return a session that changes nothing of the graph.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """
    try:
        return onnxruntime.InferenceSession(
            path, lean_options(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise ExportError(
            f"ONNX Runtime cannot load {path}", found=str(error)[:500], fix="see the message"
        ) from error


def feeds_of(inputs: Sequence[Any], tensors: Sequence[Any]) -> dict[str, np.ndarray]:
    """Return arrays by name, cast to what the ``inputs`` of a session take.

    Tensors are PyTorch's, in the order of the numbers in the inputs' names.
    """
    named = sorted(inputs, key=lambda value: trailing_number(value.name))
    return {
        value.name: np.asarray(tensor).astype(NUMPY[value.type])
        for value, tensor in zip(named, tensors, strict=True)
    }
