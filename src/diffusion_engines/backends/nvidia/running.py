"""Run a plan through the Python runtime of TensorRT or TensorRT-RTX (``trt`` is either module)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.errors import BuildError, HardwareError
from diffusion_engines.names import trailing_number

if TYPE_CHECKING:
    import torch
    from torch import nn

    Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Contexts:
    """How the execution contexts of an engine are made.

    Attributes:
        create: returns one, or None where memory does not suffice.
        capture: whether contexts record and replay CUDA graphs by themselves.
        settled: called when a set of shapes has run for the first time.
    """

    create: Callable[[], Any]
    capture: bool = False
    settled: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class _Recorded:
    """A call as a CUDA graph: where its inputs and results are, and the context that it needs."""

    run: Callable[[], Any]
    inputs: Tensors
    results: Tensors
    context: Any


def load_plan(
    trt: Any,
    path: Path,
    name: str,
    device: str,
    *,
    cuda_graph: bool = False,
    host_code: bool = False,
    prepare: Callable[[Any, Any], None] | None = None,
    contexts: Callable[[Any], Contexts] | None = None,
) -> nn.Module:
    """Return a plan as a module on a GPU. Call it only after the checks of ``preflight.py``.

    The module's work is in the order of PyTorch's current stream. It binds the addresses of its
    inputs where they already have the engine's dtype and device, and casts or moves them where not;
    it takes them in the order of the trailing number of their names (``input_0``, ``input_1``, …),
    and returns its outputs in theirs: a tensor where there is one, else a tuple. Threads take
    turns; those that share the module must share a stream too, as they do unless they choose
    others.

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
        contexts: how the engine's contexts are made, where not by the library's defaults.

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
        made = contexts(engine) if contexts else Contexts(engine.create_execution_context)
        return _module(trt, runtime, engine, made, name, device, cuda_graph)


def binding_names(trt: Any, engine: Any) -> tuple[list[str], list[str]]:
    """Return the names of an engine's inputs and of its outputs, each in order."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    names.sort(key=trailing_number)
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
    return inputs, outputs


def _new_context(contexts: Contexts, name: str) -> Any:
    import torch

    context = contexts.create()
    if context is None:
        raise HardwareError(
            f"the engine {name} could not be prepared to run",
            expected="enough free GPU memory for its activations",
            found=f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free",
            fix="free GPU memory: other processes and PyTorch's cache hold some",
        )
    return context


def _module(
    trt: Any,
    runtime: Any,
    engine: Any,
    contexts: Contexts,
    name: str,
    device: str,
    cuda_graph: bool,
) -> nn.Module:
    import torch

    from diffusion_engines.runtime.cuda_graphs import capture, cuda

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
            # Held for as long as the module: a context needs both.
            self.runtime, self.engine = runtime, engine
            # The first one is made at once, as memory may not suffice.
            self.context = _new_context(contexts, name)
            self.unused = [self.context]
            self.stream = cuda.Stream()
            self.recorded: dict[tuple[Any, ...], _Recorded] = {}
            self.settled: set[tuple[Any, ...]] = set()
            self.lock = threading.Lock()  # a context has one set of addresses

        def forward(self, *tensors: torch.Tensor) -> Any:
            held = [
                tensor.to(device, dtypes[engine.get_tensor_dtype(binding)]).contiguous()
                for tensor, binding in zip(tensors, inputs, strict=True)
            ]
            key = tuple(tuple(tensor.shape) for tensor in held)
            with torch.cuda.device(device), self.lock:
                run = self.replay if cuda_graph else self.run
                results = run(key, held)
                if key not in self.settled:
                    contexts.settled()
                    self.settled.add(key)
            return results[0] if len(results) == 1 else tuple(results)

        def run(self, key: tuple[Any, ...], held: Tensors) -> Tensors:
            return self.enqueue(self.context, held)

        def enqueue(self, context: Any, held: Tensors, results: Tensors | None = None) -> Tensors:
            for tensor, binding in zip(held, inputs, strict=True):
                if not context.set_input_shape(binding, tuple(tensor.shape)):
                    raise ValueError(
                        f"the engine {name} does not take {tuple(tensor.shape)} as {binding}; it "
                        f"was built for {self.shapes(binding)} (export.dynamic)"
                    )
                context.set_tensor_address(binding, tensor.data_ptr())
            results = results or [
                torch.empty(
                    tuple(context.get_tensor_shape(binding)),
                    dtype=dtypes[engine.get_tensor_dtype(binding)],
                    device=device,
                )
                for binding in outputs
            ]
            for result, binding in zip(results, outputs, strict=True):
                context.set_tensor_address(binding, result.data_ptr())
            with self.off_the_default_stream() as stream:
                if not context.execute_async_v3(stream.cuda_stream):
                    raise RuntimeError(f"the engine {name} failed to run")
            return results

        @contextmanager
        def off_the_default_stream(self) -> Iterator[Any]:
            """Yield the current stream, or for the default one another that is in its order.

            On the default stream the library waits for the whole device, and says so in its log.
            """
            current = torch.cuda.current_stream()
            if current != torch.cuda.default_stream():
                yield current
                return
            self.stream.wait_stream(current)
            yield self.stream
            current.wait_stream(self.stream)

        def shapes(self, binding: str) -> str:
            low, _, high = engine.get_tensor_profile_shape(binding, 0)
            return f"{tuple(low)} to {tuple(high)}"

        def replay(self, key: tuple[Any, ...], held: Tensors) -> Tensors:
            if key not in self.recorded:
                self.recorded[key] = self.record(held)
            recorded = self.recorded[key]
            for place, tensor in zip(recorded.inputs, held, strict=True):
                place.copy_(tensor)
            recorded.run()
            return recorded.results

        def record(self, held: Tensors) -> _Recorded:
            # A context for each graph: what one records is in the memory of its context, which
            # other shapes would lay out anew.
            # https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/optimization.html
            context = self.unused.pop() if self.unused else _new_context(contexts, name)
            static = [tensor.clone() for tensor in held]
            call = functools.partial(self.enqueue, context, static)
            if contexts.capture:  # by itself, at the same addresses every time
                results = call()
                return _Recorded(functools.partial(call, results), static, results, context)
            graph, results = capture(call)
            return _Recorded(graph.replay, static, results, context)

    return PlanModule()
