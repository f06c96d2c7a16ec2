"""Types of settings that targets of TensorRT and TensorRT-RTX share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# Files for PyTorch beside the plan, by torch-tensorrt; see wrapping/.
Wrap = Literal["torchscript", "exported_program"]
ComputeCapability = Annotated[str, Field(pattern=r"^\d+\.\d$")]
