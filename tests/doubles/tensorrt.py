"""A test double of the little of TensorRT's runtime that runs a plan: it doubles its input.

An engine with weights multiplies it with the one that is called ``scale`` instead, with NaN where
it has not been given one.

Its engine takes ``input_0`` (n, 4) in fp32 with n from 1 to 8. A context lays its memory out anew
when it is given another shape, and a graph that it recorded before is worth nothing then: the worst
that NVIDIA's advice of a context for each graph allows for. The streams are names without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from diffusion_engines.runtime import cuda_graphs

WIDTH = 4


def _array(address: int, shape: tuple[int, ...]) -> Any:
    size = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(shape)


class Context:
    """An execution context."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shape: tuple[int, ...] = ()
        self.layout = 0
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if shape != self.shape:
            self.shape, self.layout = shape, self.layout + 1
        return 1 <= shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.calls.append(Call(self, self.layout, self.shape, dict(self.addresses), stream))
        self.engine.calls[-1].run()
        return True


@dataclass(frozen=True)
class Call:
    """What a context was called with."""

    context: Context
    layout: int
    shape: tuple[int, ...]
    addresses: dict[str, int]
    stream: int

    def run(self) -> None:
        output = _array(self.addresses["output_0"], self.shape)
        if self.context.layout != self.layout:
            output[:] = np.nan
            return
        factor: Any = 2
        if weights := self.context.engine.weights:
            given = all(value is not None for value in weights.values())
            factor = weights["scale"] if given else np.nan
        output[:] = factor * _array(self.addresses["input_0"], self.shape)


@dataclass
class Engine:
    """An engine.

    Attributes:
        memory: how many contexts there is memory for.
        weights: those that can be refitted, by name; None: stripped.
    """

    memory: int = 8
    contexts: list[Context] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    num_io_tensors: int = 2
    weights: dict[str, Any] = field(default_factory=dict)

    def get_tensor_name(self, index: int) -> str:
        return ("output_0", "input_0")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name.startswith("input") else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return "fp32"

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[tuple[int, ...], ...]:
        return (1, WIDTH), (2, WIDTH), (8, WIDTH)

    def create_execution_context(self, config: object = None) -> Context | None:
        if len(self.contexts) == self.memory:
            return None
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Refitter:
    """Gives an engine weights; ``ok``: whether it can."""

    ok = True

    def __init__(self, engine: Engine, logger: object) -> None:
        self.engine = engine
        self.given: dict[str, Any] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.weights)

    def get_missing_weights(self) -> list[str]:
        stripped = [name for name, value in self.engine.weights.items() if value is None]
        return [name for name in stripped if name not in self.given]

    def refit_cuda_engine(self) -> bool:
        self.engine.weights |= self.given
        return self.ok


class OnnxParserRefitter:
    """Reads weights by the names of initializers; says no where some are missing, as NVIDIA's."""

    num_errors = 0

    def __init__(self, refitter: Refitter, logger: object) -> None:
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        for tensor in onnx.load(path).graph.initializer:
            if tensor.name in self.refitter.engine.weights:
                self.refitter.given[tensor.name] = numpy_helper.to_array(tensor)
        return not self.refitter.get_missing_weights()


def module_of(engine: Engine) -> Any:
    """Return a module ``tensorrt`` that loads this engine, whatever the plan."""
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    logger = lambda severity: None  # noqa: E731
    logger.WARNING = 1  # type: ignore[attr-defined]
    return SimpleNamespace(
        Logger=logger,
        Runtime=lambda logger: runtime,
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        float32="fp32",
        float16="fp16",
        int32="int32",
    )


@dataclass(eq=False)
class Stream:
    """A stream, which notes what it waits for."""

    cuda_stream: int = -1
    waits: list[Stream] = field(default_factory=list)

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)


@dataclass
class Streams:
    """The streams of a device; capture notes how often it is asked."""

    default: Stream = field(default_factory=lambda: Stream(0))
    current: Stream | None = None
    own: list[Stream] = field(default_factory=list)
    captures: int = 0

    def new(self) -> Stream:
        self.own.append(Stream(100 + len(self.own)))
        return self.own[-1]


def install_streams(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Put the double in the place of PyTorch's streams and of our capture of CUDA graphs."""
    streams = Streams()

    def capture(call: Callable[[], Any]) -> tuple[Any, Any]:
        streams.captures += 1
        results = call()
        recorded = engine.calls[-1]
        return SimpleNamespace(replay=recorded.run), results

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", streams.new)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: streams.default)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.current or streams.default)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**34))
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return streams
