"""Types of settings that targets of TensorRT and TensorRT-RTX share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
ComputeCapability = Annotated[str, Field(pattern=r"^\d+\.\d$")]
