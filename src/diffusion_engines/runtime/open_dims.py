"""Open dimensions of a graph, as ``torch.export`` takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffusion_engines.families.base import Dim, TensorSpec


def traceable(spec: TensorSpec) -> TensorSpec:
    """Give every open dimension at least two steps: torch.export takes one as a constant."""
    shape = tuple(
        replace(dim, size=max(dim.size, min(2 * dim.step, dim.max)))
        if isinstance(dim, Dim)
        else dim
        for dim in spec.shape
    )
    return replace(spec, shape=shape)


def shapes_of_dims(specs: tuple[TensorSpec, ...]) -> tuple[dict[int, Any] | None, ...]:
    """Return torch.export's dimensions of each input; inputs share those of the same name."""
    dims: dict[str, Any] = {}
    return tuple(_torch_dims(spec, dims) for spec in specs)


def _torch_dims(spec: TensorSpec, dims: dict[str, Any]) -> dict[int, Any] | None:
    axes: dict[int, Any] = {}
    for axis, dim in enumerate(spec.shape):
        if not isinstance(dim, Dim):
            continue
        low, high = -(-dim.min // dim.step), dim.max // dim.step
        base = dims.setdefault(dim.name, torch.export.Dim(dim.name, min=low, max=high))
        axes[axis] = dim.step * base if dim.step > 1 else base
    return axes or None
