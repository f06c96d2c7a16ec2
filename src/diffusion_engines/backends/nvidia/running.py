"""Run a plan through the Python runtime of TensorRT or TensorRT-RTX (``trt`` is either module)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.errors import BuildError, HardwareError
from diffusion_engines.names import trailing_number

if TYPE_CHECKING:
    import torch
    from torch import nn

    Tensors = list[torch.Tensor]


def load_plan(
    trt: Any,
    path: Path,
    name: str,
    device: str,
    *,
    cuda_graph: bool = False,
    host_code: bool = False,
    prepare: Callable[[Any, Any], None] | None = None,
) -> nn.Module:
    """Return a plan as a module on a GPU. Call it only after the checks of ``preflight.py``.

    The module runs on PyTorch's current stream. It binds the addresses of its inputs where they
    already have the engine's dtype and device, and casts or moves them where not; it takes them in
    the order of the trailing number of their names (``input_0``, ``input_1``, …), and returns
    its outputs in theirs: a tensor where there is one, else a tuple. Threads take turns; those that
    share the module must share a stream too, as they do unless they choose others.

    Args:
        trt: the Python module.
        path: the plan.
        name: of the engine, for errors.
        device: such as ``cuda``.
        cuda_graph: record a CUDA graph at the first call with each set of shapes, and replay it:
            fewer launches, but inputs are copied to where the graph expects them, and the outputs
            stay valid only until the next call.
        host_code: let a version-compatible plan run the runtime that it carries.
        prepare: called with the engine and a logger before the first run, e.g. to refit weights.

    Raises:
        BuildError: the runtime refused the plan.
        HardwareError: the GPU's memory does not suffice.
    """
    import torch

    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    with torch.cuda.device(device):
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BuildError(
                f"{trt.__name__} could not load {path}",
                fix=f"build it again: `dvc repro --force build@{name}`",
            )
        if prepare is not None:
            prepare(engine, logger)
        context = engine.create_execution_context()
        if context is None:
            raise HardwareError(
                f"{trt.__name__} could not prepare {path} to run",
                expected="enough free GPU memory for its activations",
                found=f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free",
                fix="free GPU memory: other processes and PyTorch's cache hold some",
            )
    return _module(trt, runtime, engine, context, name, device, cuda_graph)


def binding_names(trt: Any, engine: Any) -> tuple[list[str], list[str]]:
    """Return the names of an engine's inputs and of its outputs, each in order."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    names.sort(key=trailing_number)
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
    return inputs, outputs


def _module(
    trt: Any, runtime: Any, engine: Any, context: Any, name: str, device: str, cuda_graph: bool
) -> nn.Module:
    import torch

    from diffusion_engines.runtime.cuda_graphs import capture

    inputs, outputs = binding_names(trt, engine)
    dtypes = {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.int32: torch.int32,
    }
    for key in ("bfloat16", "int64"):  # not in TensorRT 8.6
        if hasattr(trt, key):
            dtypes[getattr(trt, key)] = getattr(torch, key)

    class PlanModule(torch.nn.Module):
        """Binds the tensors' addresses, and casts inputs to the dtypes of the engine."""

        def __init__(self) -> None:
            super().__init__()
            # Held for as long as the module: the context needs all three.
            self.runtime, self.engine, self.context = runtime, engine, context
            self.graphs: dict[tuple[Any, ...], tuple[Any, Tensors, Tensors]] = {}
            self.lock = threading.Lock()  # a context has one set of addresses

        def forward(self, *tensors: torch.Tensor) -> Any:
            held = [
                tensor.to(device, dtypes[engine.get_tensor_dtype(binding)]).contiguous()
                for tensor, binding in zip(tensors, inputs, strict=True)
            ]
            with torch.cuda.device(device), self.lock:
                results = self.replay(held) if cuda_graph else self.enqueue(held)
            return results[0] if len(results) == 1 else tuple(results)

        def enqueue(self, held: Tensors) -> Tensors:
            for tensor, binding in zip(held, inputs, strict=True):
                if not context.set_input_shape(binding, tuple(tensor.shape)):
                    raise ValueError(
                        f"the engine {name} does not take {tuple(tensor.shape)} as {binding}; it "
                        f"was built for {self.shapes(binding)} (export.dynamic)"
                    )
                context.set_tensor_address(binding, tensor.data_ptr())
            results = [
                torch.empty(
                    tuple(context.get_tensor_shape(binding)),
                    dtype=dtypes[engine.get_tensor_dtype(binding)],
                    device=device,
                )
                for binding in outputs
            ]
            for result, binding in zip(results, outputs, strict=True):
                context.set_tensor_address(binding, result.data_ptr())
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError(f"the engine {name} failed to run")
            return results

        def shapes(self, binding: str) -> str:
            low, _, high = engine.get_tensor_profile_shape(binding, 0)
            return f"{tuple(low)} to {tuple(high)}"

        def replay(self, held: Tensors) -> Tensors:
            key = tuple(tuple(tensor.shape) for tensor in held)
            if key not in self.graphs:
                self.graphs[key] = self.record(held)
            graph, static, results = self.graphs[key]
            for place, tensor in zip(static, held, strict=True):
                place.copy_(tensor)
            graph.replay()
            return results

        def record(self, held: Tensors) -> tuple[Any, Tensors, Tensors]:
            static = [tensor.clone() for tensor in held]
            graph, results = capture(functools.partial(self.enqueue, static))
            return graph, static, results

    return PlanModule()
