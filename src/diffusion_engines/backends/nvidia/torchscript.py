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

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.backends.preflight import rebuild, recorded
from diffusion_engines.errors import BuildError, FingerprintError, HardwareError
from diffusion_engines.manifests import Bundle, Engine
from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.processes import run_logged

if TYPE_CHECKING:
    from torch import nn

TORCHSCRIPT = "engine.ts"
_RUNTIME = Path("lib") / "libtorchtrt_runtime.so"
# Two distributions fill the same folder `torch_tensorrt`: one for each library.
DISTRIBUTIONS = {"tensorrt": "torch-tensorrt", "tensorrt_rtx": "torch-tensorrt-rtx"}
# How many numbers of the version of the plan's library must be those that the distribution was
# compiled for. TensorRT keeps its ABI within a major release; torch-tensorrt-rtx requires one
# minor release of TensorRT-RTX.
_SAME_NUMBERS = {"tensorrt": 1, "tensorrt_rtx": 2}
_LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# Python extra in pyproject.toml with the TensorRT-RTX that a released torch-tensorrt-rtx is for.
RTX_EXTRA = "rtx-torchscript"
# Where a distribution says of which form its serialized engines are.
_ABI_HEADER = Path("include") / "torch_tensorrt" / "core" / "runtime" / "runtime.h"
# What a TorchScript file depends on, and what one of another value is for.
_ABI = {
    "package": "another distribution of torch-tensorrt",
    "torch": "another PyTorch",
    "torch_tensorrt": "another torch-tensorrt",
    "tensorrt": "a torch-tensorrt for another TensorRT",
    "abi": "another form of serialized engines",
}
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


def wrap_fingerprint(backend: str, torchscript: bool) -> dict[str, str]:
    """Return what a wrapped engine depends on beyond the engine: the ABI that its file is for.

    Raises:
        HardwareError: torch-tensorrt is asked for and not installed.
    """
    if not torchscript:
        return {}
    package = _package(backend)
    torchtrtc(backend)
    return {
        "torch": _series(metadata.version("torch")),
        "package": DISTRIBUTIONS[backend],
        "torch_tensorrt": _series(metadata.version(DISTRIBUTIONS[backend])),
        "tensorrt": _built_against(package, backend),
        "abi": _abi_version(package, backend),
    }


def wrap_plan(folder: Path, manifest: Engine, backend: str) -> dict[str, str]:
    """Write ``engine.ts`` beside the plan and run it once; return what loading it depends on.

    Call it only after the backend's ``check_loadable``.

    Raises:
        HardwareError: torch-tensorrt is missing.
        FingerprintError: it is for another TensorRT than the plan.
        BuildError: torchtrtc failed or crashed, or PyTorch could not run what it wrote.
    """
    abi = wrap_fingerprint(backend, True)
    _check_series(manifest, backend, abi)
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
        "Without the TorchScript file: targets.*.torchscript=false",
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
    return abi | {"file": TORCHSCRIPT}


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
            str(_package(backend) / _RUNTIME),
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


def torchtrtc(backend: str) -> Path:
    """Return the program, of the installed package, else on PATH (NVIDIA's containers).

    Raises:
        HardwareError: it is not there.
    """
    inside = _package(backend) / "bin" / "torchtrtc"
    if inside.is_file() and os.access(inside, os.X_OK):
        return inside
    if found := shutil.which("torchtrtc"):
        return Path(found)
    raise HardwareError(
        "torchtrtc is missing",
        expected=f"{inside}, or one on PATH",
        found="neither",
        fix=f"install it again: `pip install --force-reinstall {DISTRIBUTIONS[backend]}`",
    )


def library_path(backend: str) -> str:
    """Return LD_LIBRARY_PATH with PyTorch's, TensorRT's and CUDA's libraries of this environment.

    The run path in torchtrtc is that of the machine that compiled it.
    """
    folders = [_package(backend) / "lib"]
    for module, below in (("torch", "lib"), (f"{backend}_libs", ""), ("nvidia", "")):
        spec = importlib.util.find_spec(module)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if module == "nvidia":  # nvidia/<library>/lib of CUDA's wheels
                folders += sorted(path for path in Path(place).glob("*/lib") if path.is_dir())
            else:
                folders.append(Path(place) / below)
    known = os.environ.get("LD_LIBRARY_PATH", "")
    return os.pathsep.join([*map(str, folders), *([known] if known else [])])


def check_torchscript(manifest: Bundle, backend: str) -> Path:
    """Compare the ABI that ``engine.ts`` is for with this environment; return the library to load.

    Raises:
        FingerprintError: another PyTorch, torch-tensorrt or TensorRT; or no such file was made.
        HardwareError: torch-tensorrt is missing.
    """
    if not manifest.torchscript:
        raise FingerprintError(
            f"the engine {manifest.name} was not wrapped as TorchScript",
            expected=TORCHSCRIPT,
            found="the plan alone",
            fix=f"set targets.{manifest.target}.torchscript=true and run `dvc repro`,\n"
            "or load the plan: `load_bundle`",
        )
    built = {key: recorded(manifest, "torchscript", key, str) for key in _ABI}
    here = wrap_fingerprint(backend, True)
    for key, what in _ABI.items():
        if built[key] != here[key]:
            raise FingerprintError(
                f"{TORCHSCRIPT} of {manifest.name} was wrapped for {what}",
                expected=f"{key} {built[key]}",
                found=f"{key} {here[key]}",
                fix=f"`pip install torch=={built['torch']}.*`, then\n"
                f"`pip install --no-deps {built['package']}=={built['torch_tensorrt']}.* dllist`,\n"
                f"or wrap it again here: `dvc repro wrap@{manifest.name}`; the plan itself\n"
                "does not depend on them: `load_bundle`",
            )
    return _package(backend) / _RUNTIME


def load_torchscript(folder: Path, manifest: Engine, library: Path) -> nn.Module:
    """Load ``engine.ts`` as any TorchScript file, after the checks."""
    import torch

    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    return torch.jit.load(folder / TORCHSCRIPT)  # type: ignore[no-untyped-call]


def _package(backend: str) -> Path:
    """Return the folder of torch_tensorrt without importing it: that takes a GPU's libraries.

    Raises:
        HardwareError: the distribution for this backend is not installed.
    """
    name = DISTRIBUTIONS[backend]
    spec = importlib.util.find_spec("torch_tensorrt")
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError as error:
        others = [other for other in DISTRIBUTIONS.values() if _installed(other)]
        raise HardwareError(
            f"{name}, which has torchtrtc, is not installed here",
            expected=name,
            found=", ".join(others) or "no torch-tensorrt",
            fix=f"{install_hint(backend)};\nor without the TorchScript file: "
            "targets.*.torchscript=false",
        ) from error
    if spec is None or not spec.submodule_search_locations:
        raise HardwareError(
            f"{name} is installed without its folder torch_tensorrt",
            fix=f"`pip install --force-reinstall {name}`",
        )
    return Path(spec.submodule_search_locations[0])


def install_hint(backend: str) -> str:
    """Return how to install torch-tensorrt for this PyTorch without replacing anything else.

    Without ``--no-deps`` pip takes the latest release, and with it another PyTorch and TensorRT;
    with it, ``import torch_tensorrt`` needs dllist besides what this project requires. No released
    torch-tensorrt-rtx is for TensorRT-RTX 1.7: there is an extra with one that fits.
    """
    if backend == "tensorrt_rtx":
        return f"in an environment of its own, `pip install -e '.[{RTX_EXTRA}]'`"
    series = _series(metadata.version("torch"))
    return f"`pip install --no-deps {DISTRIBUTIONS[backend]}=={series}.* dllist`"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _built_against(package: Path, backend: str) -> str:
    """Return the release series of TensorRT that the package was compiled against: "11.0"."""
    text = (package / "_version.py").read_text()
    found = re.search(rf'^__{backend}_version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise HardwareError(
            f"{package} does not say which TensorRT it is for",
            expected=f"__{backend}_version__ in _version.py",
            found="no such line",
            fix=f"`pip install --force-reinstall {DISTRIBUTIONS[backend]}`",
        )
    return _series(found.group(1))


def _abi_version(package: Path, backend: str) -> str:
    """Return the number of the form in which the package serializes engines: "9" in 2.13.

    What ``torch.ops.tensorrt.ABI_VERSION()`` returns, without loading a GPU's libraries.
    """
    header = package / _ABI_HEADER
    text = header.read_text() if header.is_file() else ""
    found = re.search(r'\bABI_VERSION = "(\d+)"', text)
    if found is None:
        raise HardwareError(
            f"{package} does not say of which form its engines are",
            expected=f"ABI_VERSION in {_ABI_HEADER}",
            found="no such line" if text else "no such file",
            fix=f"install it again: {install_hint(backend)}",
        )
    return found.group(1)


def _check_series(manifest: Engine, backend: str, abi: Mapping[str, str]) -> None:
    built = recorded(manifest, "fingerprint", backend, str)
    count, library = _SAME_NUMBERS[backend], _LIBRARIES[backend]
    needed = ".".join(built.split(".")[:count])
    if needed.split(".") != abi["tensorrt"].split(".")[:count]:
        raise FingerprintError(
            f"{abi['package']} {abi['torch_tensorrt']} is for another {library} than the plan of "
            f"{manifest.name}",
            expected=f"{library} {needed}, which built the plan",
            found=f"{library} {abi['tensorrt']}",
            fix=f"install the release of {abi['package']} for it, or build with {library} "
            f"{abi['tensorrt']}:\n{install_hint(backend)}",
        )


def _series(version: str) -> str:
    """Return "2.13" of "2.13.0+cpu": within a series, files stay loadable."""
    return ".".join(version.split("+", maxsplit=1)[0].split(".")[:2])
