"""The calls of a network: recorded, kept in a file, and read again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from diffusion_engines.families.base import Network, outputs_of
from diffusion_engines.names import trailing_number

T = TypeVar("T")

# The inputs and the outputs of one call of a network.
Call = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


class Recorder:
    """A network that keeps the inputs and the outputs of every call."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.calls: list[Call] = []

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Run the network and record the call."""
        result = self.network(*tensors)
        self.calls.append((_kept(tensors), _kept(outputs_of(result))))
        return result

    def save(self, path: Path) -> None:
        """Write all calls: ``<call>.input_0 …`` and ``<call>.output_0 …``."""
        tensors = {
            f"{index}.{kind}_{number}": tensor
            for index, call in enumerate(self.calls)
            for kind, values in zip(("input", "output"), call, strict=True)
            for number, tensor in enumerate(values)
        }
        save_file(tensors, path)


def _kept(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.detach().cpu().clone().contiguous() for tensor in tensors)


def recorded_calls(path: Path) -> list[Call]:
    """Return the inputs and the outputs of every recorded call, in order."""
    tensors = load_file(path)

    def values(index: int, kind: str) -> tuple[torch.Tensor, ...]:
        names = (name for name in tensors if name.startswith(f"{index}.{kind}_"))
        return tuple(tensors[name] for name in sorted(names, key=trailing_number))

    count = sum(name.endswith(".output_0") for name in tensors)
    return [(values(index, "input"), values(index, "output")) for index in range(count)]


def spread(values: Sequence[T], count: int | None) -> list[T]:
    """Return ``count`` of the values, evenly spread from the first to the last; None: all."""
    if count is None or count >= len(values):
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]
