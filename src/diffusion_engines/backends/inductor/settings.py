"""The schema of targets of PyTorch's own compiler, and the names of an engine's files."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from diffusion_engines.backends.base import STRICT

ENGINE = "engine.so"
# The weights that the library takes, by name: dtype, shape, strides; of one that is several of the
# network's one below the other, those as "parts".
LAYOUT = "weights.json"
# Of a bundle alone.
WEIGHTS = "weights.safetensors"


@dataclass(config=STRICT)
class InductorBuild:
    """Settings of Inductor (conf/build/inductor.yaml)."""

    channels_last: bool
    tune: bool
    cuda_graph: bool


@dataclass(config=STRICT)
class InductorTarget:
    """PyTorch's compiler ahead of time, for this machine's CPU or for an NVIDIA GPU.

    ``gpu`` is a word of the GPU's name, such as H100; null: the CPU, or any GPU.
    """

    backend: Literal["inductor"]
    device: Literal["cpu", "cuda"]
    gpu: str | None
    build: InductorBuild


def keeps_timings(target: InductorTarget) -> bool:
    """Whether a build times kernels, which it does on GPUs alone."""
    return target.build.tune and target.device == "cuda"
