"""The schema of targets of TensorRT-RTX, and what does not fit in one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from diffusion_engines.backends.base import STRICT
from diffusion_engines.backends.gpus import lacking
from diffusion_engines.backends.nvidia.settings import (
    ComputeCapability,
    NonNegativeInt,
    Weights,
    Wrap,
    stripped_problems,
)

# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(config=STRICT)
class TensorRTRTXBuild:
    """Builder settings of TensorRT-RTX (conf/build/tensorrt_rtx.yaml)."""

    max_aux_streams: NonNegativeInt | None
    tiling_optimization_level: Literal["none", "fast", "moderate", "full"]
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"]
    tf32: bool
    weights: Weights = "embedded"  # as of engines whose manifest lacks it


@dataclass(config=STRICT)
class TensorRTRTXTarget:
    """TensorRT-RTX, ahead of time for the compute capabilities named; needs no GPU to build."""

    backend: Literal["tensorrt_rtx"]
    compute_capabilities: Annotated[list[ComputeCapability], Field(min_length=1)]
    build: TensorRTRTXBuild
    # Also for PyTorch. torch-tensorrt loads the engine to wrap it: that takes such a GPU.
    wrap: list[Wrap] = Field(default_factory=list)


def check_target(target: TensorRTRTXTarget, precisions: Collection[str]) -> list[str]:
    """Return what no GPU can do; see ``base.Backend.check``."""
    problems = stripped_problems(target.build.weights, target.wrap, precisions)
    for found in target.compute_capabilities:
        problems += [
            f"compute_capabilities: {text} (conf/target/)" for text in lacking(found, precisions)
        ]
        if found not in RTX_CAPABILITIES:
            problems.append(
                f"compute_capabilities: TensorRT-RTX does not run on {found}, expected "
                f"{', '.join(RTX_CAPABILITIES)}; data-centre GPUs such as the H100 (9.0) need the "
                "backend tensorrt (conf/target/)"
            )
    return problems
