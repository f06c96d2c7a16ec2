"""The C++ compiler that packages are linked with: found, tried, and remembered.

One that compiles is not enough: a GCC that links a standard library of its own makes packages
that end the process that loads them. So a package of two layers is built and loaded, each in a
process of its own, before a compiler is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

from diffusion_engines.errors import HardwareError, IntegrityError
from diffusion_engines.files import read_json, write_json

_TRIAL = "diffusion_engines.backends.inductor.trial"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: where it is, and the first line of its ``--version``."""

    path: str
    version: str


def find_compiler(device: str) -> Compiler:
    """Return the first compiler whose packages load: that of ``CXX``, the system's, or another.

    Once one works, what was tried is remembered in the user's cache folder, by compiler, PyTorch
    and device.

    Raises:
        HardwareError: none works; says which were tried and how each failed.
    """
    known = _recall()
    failures: dict[str, str] = {}
    for path in _candidates():
        compiler = Compiler(path, _version(path))
        key = _key(compiler, device)
        failure = known[key] if key in known else try_compiler(compiler, device)
        if failure is None:
            _remember(known | failures | {key: None})
            return compiler
        failures[key] = f"{path} ({compiler.version}): {failure}"
    raise HardwareError(
        "no C++ compiler makes packages that PyTorch can load",
        expected="g++ or clang++, as PyTorch's compiler needs one",
        found="\n  ".join(failures.values()) or "no compiler",
        fix="install one (`apt install g++`), or name one: `CXX=/usr/bin/g++ make repro`;\n"
        "or take engines that others built: `dvc pull`",
    )


def try_compiler(compiler: Compiler, device: str) -> str | None:
    """Build and load a package of two layers; return how it failed, None where it did not."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {**variables(compiler), "TORCHINDUCTOR_CACHE_DIR": folder}
        for verb in ("build", "load"):
            command = [sys.executable, "-m", _TRIAL, verb, device, f"{folder}/engine.so"]
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=600,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return f"the trial to {verb} one took more than ten minutes"
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                return f"the trial to {verb} one ended with {done.returncode}: {lines[-1]}"
    return None


def variables(compiler: Compiler) -> Mapping[str, str]:
    """Return the environment in which PyTorch, Triton and nvcc take a compiler."""
    path = Path(compiler.path)
    # g++ to gcc, g++-12 to gcc-12, clang++ to clang; the C compiler beside it.
    beside = path.with_name(path.name.replace("clang++", "clang").replace("++", "cc"))
    c = beside if beside.is_file() else path
    return {"CXX": compiler.path, "CC": str(c), "CUDAHOSTCXX": compiler.path}


def _candidates() -> list[str]:
    named = [os.environ.get("CXX", ""), "/usr/bin/g++", "g++", "clang++", "c++"]
    found = [shutil.which(name) for name in named if name]
    return list(dict.fromkeys(path for path in found if path))


def _version(path: str) -> str:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    return (done.stdout.splitlines() or ["unknown version"])[0]


def _record() -> Path:
    return platformdirs.user_cache_path("diffusion-engines") / "compilers.json"


def _key(compiler: Compiler, device: str) -> str:
    changed = Path(compiler.path).resolve().stat().st_mtime_ns
    parts = [compiler.path, compiler.version, changed, torch.__version__, sys.prefix, device]
    return json.dumps(parts)


def _recall() -> dict[str, str | None]:
    """Return how each compiler that was tried failed, None where it did not."""
    path = _record()
    try:
        found = read_json(path) if path.is_file() else {}
    except IntegrityError:
        return {}  # damaged: they are tried again
    return found if isinstance(found, dict) else {}


def _remember(tried: Mapping[str, str | None]) -> None:
    path = _record()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, tried)
    except OSError:
        return  # a home that cannot be written to: it is tried again next time
