"""Types of settings that targets of TensorRT and TensorRT-RTX share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field

from diffusion_engines.precisions import PRECISIONS

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# Files for PyTorch beside the plan, by torch-tensorrt; see wrapping/.
Wrap = Literal["torchscript", "exported_program"]
ComputeCapability = Annotated[str, Field(pattern=r"^\d+\.\d$")]
# Of a plan: it keeps those that it was built with; a program may give it others; or it has none,
# was built without any, and is given those of its bundle whenever it is loaded.
Weights = Literal["embedded", "refittable", "stripped"]


def stripped_problems(
    weights: Weights, wrap: Collection[Wrap], precisions: Collection[str]
) -> list[str]:
    """Return what a target cannot have without weights in its plans; see ``base.Backend.check``."""
    if weights != "stripped":
        return []
    problems = []
    if wrap:
        problems.append(
            "wrap: a file for PyTorch has no way to get the weights of a stripped plan; set "
            "wrap=[] or build.weights=embedded (conf/target/)"
        )
    lowered = [name for name in precisions if name in PRECISIONS and not PRECISIONS[name].exported]
    problems += [
        f"build.weights: {name} is calibrated on the weights, so that they shape its graph, found "
        "stripped; set build.weights=embedded (conf/target/)"
        for name in lowered
    ]
    return problems
