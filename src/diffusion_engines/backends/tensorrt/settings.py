"""The schema of targets of TensorRT, and what does not fit in one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from diffusion_engines.backends.base import STRICT
from diffusion_engines.backends.gpus import CAPABILITIES, lacking
from diffusion_engines.backends.nvidia.settings import (
    ComputeCapability,
    NonNegativeInt,
    PositiveInt,
    Weights,
    Wrap,
    stripped_problems,
)


@dataclass(config=STRICT)
class TensorRTBuild:
    """Builder settings of TensorRT (conf/build/tensorrt.yaml)."""

    optimization_level: Annotated[int, Field(ge=0, le=5)]
    workspace_mib: PositiveInt | None
    timing_cache: bool
    max_aux_streams: NonNegativeInt | None
    profiling_verbosity: Literal["detailed", "layer_names_only", "none"]
    tf32: bool
    version_compatible: bool
    exclude_lean_runtime: bool
    hardware_compatibility: Literal["none", "same_compute_capability", "ampere_plus"]
    weights: Weights


@dataclass(config=STRICT)
class TensorRTTarget:
    """TensorRT, built on the GPU that runs it."""

    backend: Literal["tensorrt"]
    gpu: str  # a word of the name that the driver has for it, e.g. A10
    compute_capability: ComputeCapability
    wrap: list[Wrap]  # also for PyTorch
    build: TensorRTBuild


def check_target(target: TensorRTTarget, precisions: Collection[str]) -> list[str]:
    """Return what no GPU, or no plan, can do; see ``base.Backend.check``."""
    build = target.build
    problems = [
        f"compute_capability: {text} (conf/target/)"
        for text in lacking(target.compute_capability, precisions)
    ]
    known = CAPABILITIES.get(target.gpu, target.compute_capability)
    if target.compute_capability != known:
        problems.append(
            f"compute_capability: an {target.gpu} has {known}, found {target.compute_capability} "
            "(conf/target/)"
        )
    if build.hardware_compatibility == "ampere_plus" and float(target.compute_capability) < 8.0:
        problems.append(
            "build.hardware_compatibility: ampere_plus needs a GPU of compute capability 8.0 or "
            f"later, this target has {target.compute_capability} (conf/build/)"
        )
    if build.exclude_lean_runtime and not build.version_compatible:
        problems.append(
            "build.exclude_lean_runtime: only a plan with version_compatible=true has a lean "
            "runtime to exclude (conf/build/)"
        )
    if build.weights != "embedded" and build.version_compatible:
        # https://developer.nvidia.com/ja-jp/blog/tensorrt-hardware-version-compatibility/
        problems.append(
            f"build.weights: the lean runtime of a version-compatible plan refits none, found "
            f"{build.weights}; set build.weights=embedded or build.version_compatible=false "
            "(conf/target/)"
        )
    problems += stripped_problems(build.weights, target.wrap, precisions)
    if "torchscript" in target.wrap and build.hardware_compatibility != "none":
        problems.append(
            "wrap: torchtrtc ties its file to the GPU that it was wrapped on, whatever the plan "
            "fits; set wrap=[exported_program] or build.hardware_compatibility=none (conf/target/)"
        )
    if target.wrap and build.version_compatible and not build.exclude_lean_runtime:
        problems.append(
            "wrap: torch-tensorrt does not let a plan run the runtime that it carries; set "
            "wrap=[] or build.exclude_lean_runtime=true (conf/target/)"
        )
    return problems
