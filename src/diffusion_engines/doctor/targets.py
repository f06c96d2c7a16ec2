"""The targets that the toy network is built for: this machine, with the settings of conf/build/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from omegaconf import OmegaConf

from diffusion_engines.backends import gpus
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from diffusion_engines.backends.tensorrt.settings import TensorRTBuild, TensorRTTarget
from diffusion_engines.backends.tensorrt_rtx.settings import (
    RTX_CAPABILITIES,
    TensorRTRTXBuild,
    TensorRTRTXTarget,
)
from diffusion_engines.files import read_json, write_json
from diffusion_engines.yaml_files import read_mapping

_BUILDS = "builds.json"
# Built for where no GPU is: that of an A10.
_CAPABILITY = "8.6"


@dataclass(frozen=True)
class Builds:
    """Builder settings of each backend."""

    onnxruntime: OnnxRuntimeBuild
    tensorrt: TensorRTBuild
    tensorrt_rtx: TensorRTRTXBuild


def write_builds(conf: Path, folder: Path) -> None:
    """Put the settings in ``conf/build/`` where the checks read them."""
    files = {name: conf / "build" / f"{name}.yaml" for name in get_type_hints(Builds)}
    found = {name: OmegaConf.to_container(read_mapping(path)) for name, path in files.items()}
    write_json(folder / _BUILDS, found)


def builds(folder: Path) -> Builds:
    """Return the settings that :func:`write_builds` wrote."""
    found = read_json(folder / _BUILDS)
    return Builds(**{name: kind(**found[name]) for name, kind in get_type_hints(Builds).items()})


def cpu_target(folder: Path) -> OnnxRuntimeTarget:
    """Return the target of ONNX Runtime on this machine's CPU."""
    return OnnxRuntimeTarget("onnxruntime", "cpu", builds(folder).onnxruntime)


def tensorrt_target(folder: Path) -> TensorRTTarget:
    """Return the target of TensorRT on this machine's GPU, without wraps.

    Raises:
        HardwareError: there is none.
    """
    gpu = gpus.any_gpu()
    return TensorRTTarget("tensorrt", gpu.name, gpu.capability, [], builds(folder).tensorrt)


def rtx_target(folder: Path) -> TensorRTRTXTarget:
    """Return the target of TensorRT-RTX: this machine's GPU if it supports it, else an A10's."""
    gpu = gpus.find_gpu()
    here = gpu.capability if gpu and gpu.capability in RTX_CAPABILITIES else _CAPABILITY
    return TensorRTRTXTarget("tensorrt_rtx", [here], builds(folder).tensorrt_rtx)
