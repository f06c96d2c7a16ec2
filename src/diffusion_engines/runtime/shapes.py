"""What an engine takes, as its manifest says, and a clear answer to all else.

The runtimes answer a wrong shape each in their own way, from an exception that names a node deep
in the graph to a silent reallocation; none says what would have been right.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from diffusion_engines.backends.targets import device_of_engine
from diffusion_engines.errors import ConfigError, HardwareError, ShapeError
from diffusion_engines.families import role_of
from diffusion_engines.families.base import Dim, TensorSpec
from diffusion_engines.manifests import Engine
from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.runtime.bundle import is_device

# What the dimensions of a fixed shape are called; open ones carry their names.
_AXES = {
    "token ids": ("batch", "tokens"),
    "latents": ("batch", "channels", "height", "width"),
    "timestep": ("steps",),
    "text embeddings": ("batch", "tokens", "features"),
    "pooled embedding": ("batch", "features"),
    "sizes": ("batch", "numbers"),
}
# The dimensions that an export may leave open (conf/export/dynamic.yaml).
_OPENED = ("batch", "height", "width")
# What to do about the others.
_FIXED = {
    "tokens": "engines are built for the 77 tokens that CLIP reads at once: shorten the prompt,\n"
    "or leave out what splits a long one into several pieces",
    "features": "take embeddings of the model's own text encoders",
    "channels": "take latents of the model's own VAE: engines are for text to image",
}

C = TypeVar("C", bound=type)


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

    @property
    def open(self) -> bool:
        """Whether there are several."""
        return self.low < self.high

    def __str__(self) -> str:
        if not self.open:
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


def immovable(cls: C) -> C:
    """Make ``half()``, ``cuda()`` and the like what ``to()`` of a class of modules makes of them.

    PyTorch's own look for parameters, which an engine has none of, and would do nothing.
    """

    def method(name: str, wanted: Any) -> Any:
        def moved(self: Any, *index: Any) -> Any:
            return self.to(*(index or [wanted]))

        moved.__name__ = moved.__qualname__ = name
        moved.__doc__ = f"Do what ``to({wanted})`` does."
        return moved

    for name in ("float", "half", "bfloat16", "double"):
        setattr(cls, name, method(name, getattr(torch, name)))
    for name in ("cpu", "cuda"):
        setattr(cls, name, method(name, name))
    return cls


@immovable
class CheckedEngine(torch.nn.Module):
    """An engine that refuses what it was not built for, and says what it takes.

    It belongs to the process that loaded it: the threads of a runtime do not live on in a child
    after ``fork()``, which would wait for them forever.

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
        self.process = os.getpid()

    @property
    def capturable(self) -> bool:
        """Whether its calls can be part of a CUDA graph (``runtime/denoising.py``)."""
        return bool(getattr(self.engine, "capturable", False))

    @property
    def device(self) -> torch.device:
        """What it was built for."""
        return torch.device(device_of_engine(self.manifest))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing where the engine already is what is asked for.

        Raises:
            HardwareError: another device or precision is asked for; both are fixed by the build.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and not is_device(device, self.device.type):
            raise HardwareError(
                f"the engine {self.name} cannot be moved",
                expected=str(self.device),
                found=f".to({str(device)!r})",
                fix=f"load the engines of a target for {device.type}; to choose among several\n"
                "GPUs, set CUDA_VISIBLE_DEVICES",
            )
        precision = self.manifest.precision
        # An engine in 8 bits has the inputs of what it was made from; its manifest says which.
        inputs = {str(value.dtype) for value in self.manifest.inputs}
        allowed = {"float32", PRECISIONS[precision].torch_dtype, *inputs}
        if dtype is not None and str(dtype).removeprefix("torch.") not in allowed:
            raise HardwareError(
                f"the engine {self.name} cannot change its precision",
                expected=precision,
                found=f".to({dtype})",
                fix="leave the dtype out; the precision is chosen in conf/fleet/",
            )
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or copied.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"the engine {self.name} cannot be pickled or copied",
            expected="the folder that it was loaded from",
            found="an engine in the memory of this process",
            fix="hand the folder on, and load it there: `load_pipeline` or `load_component`",
        )

    def check_process(self) -> None:
        """Raise HardwareError in another process than the one that loaded the engine."""
        if self.process != os.getpid():
            raise HardwareError(
                f"the engine {self.name} was loaded before this process was forked",
                expected=f"a call in process {self.process}, whose threads run it",
                found=f"a call in process {os.getpid()}, which has none of them",
                fix="load it in each process: without gunicorn's `preload_app`, or in its hook\n"
                "`post_fork`; multiprocessing has the start method `spawn`",
            )

    def forward(self, *tensors: torch.Tensor | float, **named: object) -> Any:
        """Run the engine; return its output, or a tuple of several.

        A number, or a tensor of no dimension, stands for one of a single element: a timestep.

        Raises:
            ShapeError: a tensor has a size outside of what the engine was built for, holds no
                numbers, or is given by name.
            HardwareError: this process was forked from the one that loaded the engine.
        """
        self.check_process()
        if named or len(tensors) != len(self.inputs):
            found = [f"{len(tensors)} tensor(s)", *(f"{name}=…" for name in named)]
            raise ShapeError(
                f"the engine {self.name} was called with other arguments than it takes",
                expected=", ".join(value.role for value in self.inputs),
                found=", ".join(found),
                fix="give these tensors in this order, and nothing by name; the networks of\n"
                "`load_pipeline` are called as diffusers' are",
            )
        return self.engine(*map(self._checked, tensors, self.inputs))

    def _checked(self, value: torch.Tensor | float, sizes: InputSizes) -> torch.Tensor:
        tensor = torch.as_tensor(value)
        if tensor.dim() == 0 and len(sizes.axes) == 1:
            tensor = tensor.reshape(1)
        ids = sizes.role == "token ids"
        if (
            tensor.is_complex()
            or tensor.dtype == torch.bool
            or (ids and tensor.is_floating_point())
        ):
            raise ShapeError(
                f"the engine {self.name} takes no {tensor.dtype} for {sizes.role}",
                expected="integers" if ids else "real numbers",
                found=str(tensor.dtype),
                fix="convert them before: a cast would drop what they say without a word",
            )
        self._check(tuple(tensor.shape), sizes)
        return tensor

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
                fix=self._fix([axis for _, axis in wrong]),
            )

    def _pixels(self, axis: Sizes) -> str:
        if axis.name not in ("height", "width") or self.pixels_per_latent is None:
            return ""
        return f" ({axis.scaled(self.pixels_per_latent)} pixels)"

    def _fix(self, wrong: Sequence[Sizes]) -> str:
        for axis in wrong:
            if axis.name not in _OPENED:
                return _FIXED.get(axis.name, "call it with what belongs to its own model")
        if all(axis.name != "batch" for axis in wrong):
            return f"ask for a size in this range;\n{wider(wrong)}"
        component, rows = self.manifest.component, "ask for fewer prompts or images per call"
        if role_of(component) == "denoiser":
            rows = (
                f"the {component} gets two rows per image with guidance, and one without\n"
                "(guidance_scale up to 1): ask for fewer images per call"
                if self.manifest.guidance
                else f"the {component} was built without guidance and gets one row per image:\n"
                "call the pipeline with guidance_scale=1, or ask for fewer images per call"
            )
        return f"{rows};\n{wider(wrong)}"


def wider(wrong: Sequence[Sizes]) -> str:
    """Return how to get engines for other sizes of these dimensions."""
    if all(axis.open for axis in wrong):
        return (
            "or widen the ranges that the engine was built for (conf/export/dynamic.yaml), and\n"
            "build it again: `make repro`"
        )
    return (
        'or build an engine for several sizes: `make repro ARGS="export=dynamic"`, with the\n'
        "ranges in conf/export/dynamic.yaml"
    )
