"""Checks of what is there: the GPU, its driver, programs, libraries."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from diffusion_engines.backends import gpus
from diffusion_engines.backends.base import Graph
from diffusion_engines.backends.nvidia.wrapping import distribution
from diffusion_engines.backends.tensorrt.building import versions
from diffusion_engines.backends.tensorrt.building.trtexec import (
    find_trtexec,
    format_version,
    parse_version,
    trtexec_command,
)
from diffusion_engines.backends.tensorrt_rtx import building as rtx
from diffusion_engines.doctor import toy
from diffusion_engines.doctor.findings import Finding, missing, passed
from diffusion_engines.doctor.targets import builds
from diffusion_engines.errors import BuildError, HardwareError

# What an engine or a wrap can depend on, by the names of distributions.
_DISTRIBUTIONS = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch-tensorrt",
    "torch-tensorrt-rtx",
    "dllist",
    "nvidia-modelopt",
)


def check_gpu(folder: Path) -> Finding:
    """Ask PyTorch for the GPU."""
    import torch

    gpu = gpus.find_gpu()
    if gpu is None:
        why = "PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees none"
        return missing(f"no NVIDIA GPU: {why}", torch=torch.__version__)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return passed(
        f"{gpu}, {memory:.0f} GiB",
        name=gpu.name,
        capability=gpu.capability,
        cuda=torch.version.cuda,
    )


def check_driver(folder: Path) -> Finding:
    """Ask nvidia-smi for the driver's branch."""
    try:
        return passed(f"branch {(branch := gpus.driver_branch())}", branch=branch)
    except HardwareError as error:
        return missing(error.found)


def check_libraries(folder: Path) -> Finding:
    """List the versions of what engines and wraps depend on."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    here = f"Python {platform.python_version()}, {platform.platform()}"
    return passed(here, executable=sys.executable, **found)


def check_trtexec(folder: Path) -> Finding:
    """Read trtexec's banner, and whether it has every option of a command of ours in its help."""
    found = find_trtexec()
    if found is None:
        return missing("trtexec is not on PATH (in NVIDIA's containers: /opt/tensorrt/bin)")
    path, version = found
    done = subprocess.run([path, "--help"], capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    graph = Graph("toy", toy.COMPONENT, toy.PRECISION, "onnx", Path("model.onnx"), toy.INPUTS)
    command = trtexec_command(
        path,
        version,
        graph=graph,
        plan=Path("engine.plan"),
        layers=Path("layers.json"),
        timing_cache=Path("timing.cache"),
        build=builds(folder).tensorrt,
    )
    words = {word.partition("=")[0] for word in command[1:]}
    known = set(re.findall(r"--\w+", text))
    if unknown := sorted(words - known):
        raise BuildError(
            f"the help of {path} lacks options that a build would pass",
            expected=", ".join(sorted(words)),
            found=f"not there: {', '.join(unknown)}",
            fix="send this back with the output of `trtexec --help`",
        )
    banner = next((line for line in text.splitlines() if "[TensorRT v" in line), "")
    return passed(f"{format_version(version)} at {path}", banner=banner, options=sorted(words))


def check_tensorrt(folder: Path) -> Finding:
    """Import TensorRT's Python API, with its library."""
    if importlib.util.find_spec("tensorrt") is None:
        return missing("the library tensorrt is not installed")
    trt = versions.library()
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    fast = {"fast_fp16": getattr(builder, "platform_has_fast_fp16", None)}
    return passed(trt.__version__, version=format_version(parse_version(trt.__version__)), **fast)


def check_tensorrt_rtx(folder: Path) -> Finding:
    """Import TensorRT-RTX."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return missing("the library tensorrt_rtx is not installed")
    version = rtx.library().__version__
    return passed(version, version=version)


def check_torch_tensorrt(folder: Path) -> Finding:
    """Read what torch-tensorrt is for, and the form of its engines."""
    found = {}
    for backend, name in distribution.DISTRIBUTIONS.items():
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found[backend] = distribution.wrap_fingerprint(backend, ["torchscript"])
    if not found:
        return missing("no torch-tensorrt is installed: " + distribution.install_hint("tensorrt"))
    told = [f"{abi['package']} {abi['torch_tensorrt']}, ABI {abi['abi']}" for abi in found.values()]
    return passed("; ".join(told), **found)
