"""Which sizes an engine takes, as its manifest says, and a clear answer to all others.

The runtimes answer a wrong shape each in their own way, from an exception that names a node deep
in the graph to a silent reallocation; none says what would have been right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_engines.errors import ShapeError
from diffusion_engines.families import role_of
from diffusion_engines.families.base import Dim, TensorSpec
from diffusion_engines.manifests import Engine

# What the dimensions of a fixed shape are called; open ones carry their names.
_AXES = {
    "token ids": ("batch", "tokens"),
    "latents": ("batch", "channels", "height", "width"),
    "timestep": ("steps",),
    "text embeddings": ("batch", "tokens", "features"),
    "pooled embedding": ("batch", "features"),
    "sizes": ("batch", "numbers"),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes that one dimension may have: ``low`` to ``high`` in steps of ``step``.

    ``usual`` is the one that the engine was built around.
    """

    name: str
    low: int
    high: int
    step: int
    usual: int

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high and size % self.step == 0

    def scaled(self, factor: int) -> Sizes:
        """The same in a finer unit, such as pixels for latents."""
        low, high, step, usual = (
            factor * value for value in (self.low, self.high, self.step, self.usual)
        )
        return Sizes(self.name, low, high, step, usual)

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        return f"{self.low} to {self.high}" + (f" in steps of {self.step}" if self.step > 1 else "")


@dataclass(frozen=True)
class InputSizes:
    """One input of an engine: what it holds and the sizes that each dimension may have."""

    role: str
    axes: tuple[Sizes, ...]

    def __str__(self) -> str:
        return f"{self.role} ({', '.join(f'{axis.name} {axis}' for axis in self.axes)})"

    def axis(self, name: str) -> Sizes:
        """The sizes of a dimension by name, e.g. ``batch``."""
        return next(axis for axis in self.axes if axis.name == name)


def input_sizes(inputs: Sequence[TensorSpec]) -> tuple[InputSizes, ...]:
    """Return the sizes of the ``inputs`` of a manifest."""
    return tuple(
        InputSizes(
            item.role, tuple(_sizes(dim, item.role, index) for index, dim in enumerate(item.shape))
        )
        for item in inputs
    )


def _sizes(dim: int | Dim, role: str, index: int) -> Sizes:
    if isinstance(dim, int):
        names = _AXES.get(role, ())
        return Sizes(names[index] if index < len(names) else f"axis {index}", dim, dim, 1, dim)
    # As the exporter rounds the bounds: inwards, to whole steps.
    low, high = -(-dim.min // dim.step) * dim.step, dim.max // dim.step * dim.step
    return Sizes(dim.name, low, high, dim.step, dim.size)


class CheckedEngine(torch.nn.Module):
    """An engine that refuses sizes that it was not built for, and says which it takes.

    Attributes:
        name: of the engine, e.g. ``cpu-unet``.
        manifest: of the bundle, or of the engine.
        inputs: the sizes of each input, in order.
        pixels_per_latent: set where it is known, so that messages speak of pixels too.
    """

    def __init__(self, engine: torch.nn.Module, manifest: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.manifest = manifest
        self.name = manifest.name
        self.inputs = input_sizes(manifest.inputs)
        self.pixels_per_latent: int | None = None

    @property
    def capturable(self) -> bool:
        """Whether its calls can be part of a CUDA graph (``runtime/denoising.py``)."""
        return bool(getattr(self.engine, "capturable", False))

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Run the engine; return its output, or a tuple of several.

        Raises:
            ShapeError: a tensor has a size outside of what the engine was built for.
        """
        if len(tensors) != len(self.inputs):
            raise ShapeError(
                f"the engine {self.name} was called with the wrong number of tensors",
                expected=", ".join(value.role for value in self.inputs),
                found=f"{len(tensors)} tensor(s)",
            )
        for tensor, sizes in zip(tensors, self.inputs, strict=True):
            self._check(tuple(tensor.shape), sizes)
        return self.engine(*tensors)

    def _check(self, shape: tuple[int, ...], sizes: InputSizes) -> None:
        if len(shape) != len(sizes.axes):
            raise ShapeError(
                f"the engine {self.name} takes {sizes.role} of {len(sizes.axes)} dimensions",
                expected=str(sizes),
                found=str(shape),
            )
        pairs = zip(shape, sizes.axes, strict=True)
        wrong = [(size, axis) for size, axis in pairs if size not in axis]
        if wrong:
            raise ShapeError(
                f"the engine {self.name} was not built for {sizes.role} of shape {shape}",
                expected=", ".join(f"{a.name} {a}{self._pixels(a)}" for _, a in wrong),
                found=", ".join(f"{axis.name} {size}" for size, axis in wrong),
                fix=self._fix([axis.name for _, axis in wrong]),
            )

    def _pixels(self, axis: Sizes) -> str:
        if axis.name not in ("height", "width") or self.pixels_per_latent is None:
            return ""
        return f" ({axis.scaled(self.pixels_per_latent)} pixels)"

    def _fix(self, names: Sequence[str]) -> str:
        rows = "ask for fewer prompts or images per call"
        component = self.manifest.component
        if role_of(component) == "denoiser":
            rows = (
                f"the {component} gets two rows per image, for the guidance: ask for fewer images\n"
                "per call"
                if self.manifest.guidance
                else f"the {component} was built without guidance and gets one row per image:\n"
                "call the pipeline with guidance_scale=1, or ask for fewer images per call"
            )
        return (
            (f"{rows};\n" if "batch" in names else "ask for a size in this range;\n")
            + 'or build an engine for several sizes: `make repro ARGS="export=dynamic"`, with the\n'
            "ranges in conf/export/dynamic.yaml"
        )
