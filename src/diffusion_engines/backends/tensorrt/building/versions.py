"""Which TensorRT builds here: ``trtexec`` on PATH, or the Python package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_engines.backends import require
from diffusion_engines.backends.tensorrt.building.trtexec import (
    OLDEST,
    OLDEST_PYTHON,
    Version,
    format_version,
    parse_version,
)
from diffusion_engines.errors import HardwareError


def library() -> Any:
    """Return the module tensorrt.

    Raises:
        HardwareError: it is not installed, or is there without libnvinfer.
    """
    trt = require("tensorrt", "pip install tensorrt")
    if not hasattr(trt, "Builder"):
        raise HardwareError(
            "the package tensorrt is here without the library",
            expected="the bindings and libnvinfer",
            found=f"{trt.__name__} at {getattr(trt, '__file__', None)}",
            fix="install TensorRT from NVIDIA, or use one of NVIDIA's containers",
        )
    return trt


def builder_version(trtexec: tuple[Path, Version] | None) -> Version:
    """Return the version of what builds here.

    Args:
        trtexec: as ``find_trtexec`` returns it.

    Raises:
        HardwareError: there is neither, or it is too old.
    """
    version = trtexec[1] if trtexec else parse_version(library().__version__)
    oldest = OLDEST if trtexec else OLDEST_PYTHON
    if version < oldest:
        raise HardwareError(
            f"this TensorRT is too old{'' if trtexec else ' to build through its Python API'}",
            expected=f"{format_version(oldest)} or later",
            found=format_version(version),
            fix="install a later TensorRT"
            + ("" if trtexec else f", or put trtexec on PATH (from {format_version(OLDEST)} on)"),
        )
    return version
