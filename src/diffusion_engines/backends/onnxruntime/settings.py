"""The schema of targets of ONNX Runtime."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from diffusion_engines.backends.base import STRICT


@dataclass(config=STRICT)
class OnnxRuntimeBuild:
    """Graph optimization of ONNX Runtime (conf/build/onnxruntime.yaml)."""

    optimization_level: Literal["disabled", "basic", "extended", "all"]
    tf32: bool


@dataclass(config=STRICT)
class OnnxRuntimeTarget:
    """ONNX Runtime on the CPU, or on an NVIDIA GPU with onnxruntime-gpu."""

    backend: Literal["onnxruntime"]
    device: Literal["cpu", "cuda"]
    build: OnnxRuntimeBuild
