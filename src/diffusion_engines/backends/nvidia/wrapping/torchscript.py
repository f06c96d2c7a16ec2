"""Wrap a plan as TorchScript with ``torchtrtc``, the program that torch-tensorrt brings along.

The file needs no Python of this project: with torch-tensorrt's runtime library loaded,
``torch.jit.load`` returns a module that takes the inputs in the order of the trailing number of
their names. torchtrtc loads the plan while it wraps it and crashes when it cannot: nothing there
catches what its library throws, so that it is aborted (exit status 134), and that of
torch-tensorrt-rtx 2.11 ended in a segmentation fault on an engine of another compute capability.
Hence wrapping has the same checks in front of it as loading, and runs in a process of its own.
``torch.jit.load`` of a file whose plan cannot be loaded raises RuntimeError.
https://docs.pytorch.org/TensorRT/cli/torchtrtc.html
https://github.com/pytorch/TensorRT/blob/main/cpp/bin/torchtrtc/main.cpp
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.backends.nvidia.wrapping.distribution import (
    RUNTIME,
    install_hint,
    library_path,
    package_of,
    torchtrtc,
)
from diffusion_engines.backends.preflight import rebuild
from diffusion_engines.errors import BuildError
from diffusion_engines.manifests import Engine
from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.processes import run_logged

if TYPE_CHECKING:
    from torch import nn

TORCHSCRIPT = "engine.ts"
# Loads the file as a user would and runs it once.
_TRIAL = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
module = torch.jit.load(sys.argv[2])
tensors = [torch.zeros(shape, dtype=getattr(torch, dtype), device=sys.argv[4])
           for shape, dtype in json.loads(sys.argv[3])]
output = module(*tensors)
print([tuple(value.shape) for value in (output if isinstance(output, (list, tuple)) else [output])])
if sys.argv[4] == "cuda":
    torch.cuda.synchronize()
"""
_DEVICE = "cuda"


def write_torchscript(folder: Path, manifest: Engine, backend: str) -> str:
    """Write ``engine.ts`` beside the plan and run it once; return its name.

    Call it only after the backend's ``check_loadable``.

    Raises:
        HardwareError: torchtrtc is missing.
        BuildError: torchtrtc failed or crashed, or PyTorch could not run what it wrote.
    """
    plan, target, log = (
        folder / manifest.engine,
        folder / TORCHSCRIPT,
        folder / "torchtrtc.log",
    )
    env = {"LD_LIBRARY_PATH": library_path(backend)}
    # Absolute: torchtrtc resolves paths by itself.
    files = (plan.resolve(), target.resolve())
    run_logged(
        [torchtrtc(backend), *files, "--embed-engine", "--device-type=gpu"],
        log,
        what=f"torchtrtc, wrapping {manifest.name}",
        fix="a missing library: install PyTorch with CUDA, and TensorRT; a crash: a plan that\n"
        f"this machine cannot load, so build it here ({rebuild(manifest)}).\n"
        "Without the TorchScript file: targets.*.wrap=[]",
        env=env,
    )
    if not target.is_file() or target.stat().st_size <= plan.stat().st_size // 2:
        raise BuildError(
            f"torchtrtc wrote no complete {TORCHSCRIPT} for {manifest.name}",
            expected=f"a file of about {plan.stat().st_size} bytes, as the plan",
            found=f"{target.stat().st_size} bytes" if target.is_file() else "none",
            fix="run it again with free disk space; its log: " + log.read_text()[-400:],
        )
    _try(folder, manifest, backend, env)
    log.unlink()
    return TORCHSCRIPT


def _try(folder: Path, manifest: Engine, backend: str, env: Mapping[str, str]) -> None:
    precision = PRECISIONS[manifest.precision]
    inputs = [
        (
            value.size,
            precision.torch_dtype if value.dtype == "component" else value.dtype,
        )
        for value in manifest.inputs
    ]
    log = folder / "trial.log"
    run_logged(
        [
            sys.executable,
            "-c",
            _TRIAL,
            str(package_of(backend) / RUNTIME),
            str(folder / TORCHSCRIPT),
            json.dumps(inputs),
            _DEVICE,
        ],
        log,
        what=f"torch.jit.load, running {TORCHSCRIPT} of {manifest.name}",
        fix=f"the torch-tensorrt that wrote it must be for this PyTorch:\n{install_hint(backend)}",
        env=env,
    )
    log.unlink()


def load_torchscript(path: Path, backend: str) -> nn.Module:
    """Load ``engine.ts`` as any TorchScript file, after the checks."""
    import torch

    library = package_of(backend) / RUNTIME
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    return torch.jit.load(path)  # type: ignore[no-untyped-call]
