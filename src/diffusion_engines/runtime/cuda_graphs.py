"""Calls as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

cuda: Any = torch.cuda  # untyped in places
T = TypeVar("T")


def capture(call: Callable[[], T], *, warmup: int = 1) -> tuple[Any, T]:
    """Record a call as a CUDA graph of the current GPU; return the graph and the call's result.

    A replay works in the memory of this call, and leaves its results where this result is.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture

    Args:
        call: enqueues work on PyTorch's current stream, and does nothing else.
        warmup: how often it runs before, on a stream of its own: libraries choose and load their
            kernels at first, and allocate, which no graph may record.
    """
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(warmup):
            call()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        result = call()
    return graph, result
