"""Trace a network without the arithmetic that dominates its run.

TorchScript's tracer runs the network and keeps its operators and their shapes. In fp16, on a CPU
without instructions for it, PyTorch's convolutions reach a gigaflop a second: the UNet of SD 1.4
takes most of an hour to trace.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

# Kernels below the tracer, so that it records the same operators.
_MATMULS = ("mm", "addmm", "bmm", "baddbmm")
_CONVOLUTION = "_slow_conv2d_forward"  # where oneDNN has none, as for fp16


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Let matrix products, and convolutions that are slow, be zeros on the CPU meanwhile."""
    # Holds the registrations: PyTorch's own kernels are back when it goes.
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="[^a-z]*Warning only once for all operators")
            for name in _MATMULS:
                operator = getattr(torch.ops.aten, name).default
                library.impl(name, partial(_zeros, operator), "CPU")
            library.impl(_CONVOLUTION, partial(_zeros, _convolution), "CPU")
        yield
    finally:
        library._destroy()


def _zeros(operator: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    def shape(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    named = {key: shape(value) for key, value in options.items()}
    result = operator(*map(shape, args), **named)
    return torch.zeros(result.shape, dtype=result.dtype)


def _convolution(
    values: torch.Tensor,
    weight: torch.Tensor,
    kernel_size: list[int],
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
) -> torch.Tensor:
    """Stand for the kernel, which knows no shapes by itself."""
    return torch.convolution(values, weight, bias, stride, padding, [1, 1], False, [0, 0], 1)
