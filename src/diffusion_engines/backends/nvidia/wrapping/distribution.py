"""torch-tensorrt: which one is here, what it is for, and what its files depend on."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path

from diffusion_engines.backends.preflight import recorded
from diffusion_engines.errors import FingerprintError, HardwareError
from diffusion_engines.manifests import Bundle, Engine

RUNTIME = Path("lib") / "libtorchtrt_runtime.so"
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


def wrap_fingerprint(backend: str, wrap: Collection[str]) -> dict[str, str]:
    """Return what wraps depend on beyond the engine: the ABI that their files are for.

    Args:
        backend: the plan's.
        wrap: what the target asks for; nothing depends on nothing.

    Raises:
        HardwareError: torch-tensorrt is asked for and not installed.
    """
    if not wrap:
        return {}
    package = package_of(backend)
    if "torchscript" in wrap:
        torchtrtc(backend)
    return {
        "torch": series_of(metadata.version("torch")),
        "package": DISTRIBUTIONS[backend],
        "torch_tensorrt": series_of(metadata.version(DISTRIBUTIONS[backend])),
        "tensorrt": _built_against(package, backend),
        "abi": _abi_version(package, backend),
    }


def torchtrtc(backend: str) -> Path:
    """Return the program, of the installed package, else on PATH (NVIDIA's containers).

    Raises:
        HardwareError: it is not there.
    """
    inside = package_of(backend) / "bin" / "torchtrtc"
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
    folders = [package_of(backend) / "lib"]
    for module, below in (("torch", "lib"), (f"{backend}_libs", ""), ("nvidia", "")):
        spec = importlib.util.find_spec(module)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if module == "nvidia":  # nvidia/<library>/lib of CUDA's wheels
                folders += sorted(path for path in Path(place).glob("*/lib") if path.is_dir())
            else:
                folders.append(Path(place) / below)
    known = os.environ.get("LD_LIBRARY_PATH", "")
    return os.pathsep.join([*map(str, folders), *([known] if known else [])])


def check_abi(manifest: Bundle, backend: str, key: str, kind: str) -> str:
    """Compare the ABI that a wrap is for with this environment; return the wrap's file.

    Args:
        manifest: of the bundle.
        backend: its plan's.
        key: of the file in the manifest's section ``torchscript``.
        kind: of wrap, as the target's setting ``wrap`` calls it.

    Raises:
        FingerprintError: another PyTorch, torch-tensorrt or TensorRT; or no such file was made.
        HardwareError: torch-tensorrt is missing.
    """
    if key not in manifest.torchscript:
        raise FingerprintError(
            f"the engine {manifest.name} was not wrapped as {kind}",
            expected=f"{kind} in the target's `wrap`",
            found="the plan alone" if not manifest.torchscript else "another wrap",
            fix=f"add {kind} to targets.{manifest.target}.wrap and run `dvc repro`,\n"
            "or load the plan: `load_bundle`",
        )
    file = recorded(manifest, "torchscript", key, str)
    built = {name: recorded(manifest, "torchscript", name, str) for name in _ABI}
    here = wrap_fingerprint(backend, [kind])
    for name, what in _ABI.items():
        if built[name] != here[name]:
            raise FingerprintError(
                f"{file} of {manifest.name} was wrapped for {what}",
                expected=f"{name} {built[name]}",
                found=f"{name} {here[name]}",
                fix=f"`pip install torch=={built['torch']}.*`, then\n"
                f"`pip install --no-deps {built['package']}=={built['torch_tensorrt']}.* dllist`,\n"
                f"or wrap it again here: `dvc repro wrap@{manifest.name}`; the plan itself\n"
                "does not depend on them: `load_bundle`",
            )
    return file


def package_of(backend: str) -> Path:
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
            f"{name}, is not installed here",
            expected=name,
            found=", ".join(others) or "no torch-tensorrt",
            fix=f"{install_hint(backend)};\nor without wraps: targets.*.wrap=[]",
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
    series = series_of(metadata.version("torch"))
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
    return series_of(found.group(1))


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


def check_series(manifest: Engine, backend: str, abi: Mapping[str, str]) -> None:
    """Compare the library that built a plan with the one that torch-tensorrt is for.

    Raises:
        FingerprintError: they are not of one series.
    """
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


def series_of(version: str) -> str:
    """Return "2.13" of "2.13.0+cpu": within a series, files stay loadable."""
    return ".".join(version.split("+", maxsplit=1)[0].split(".")[:2])
