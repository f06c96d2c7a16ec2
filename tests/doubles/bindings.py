"""The names of a real Python API of TensorRT: its bindings from their wheel, over stub libraries.

``python bindings.py MODULE`` writes what the module has as JSON. It runs in a process of its own:
two releases of the bindings cannot be in one.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STUB = Path(__file__).with_name("libnvinfer.c")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
WHEEL = "tensorrt-cu13-bindings"

# The members of each class, "ILogger.Severity" among them, each with its docstring; under "", what
# the module itself has.
Api = Mapping[str, Mapping[str, str]]


class UnavailableError(Exception):
    """A release cannot be looked at here; says why."""


def api_of_release(version: str, folder: Path) -> Api:
    """Return the API of a release of TensorRT, such as ``11.4.0.106``.

    Args:
        version: of the wheel of the bindings.
        folder: gets the wheel's content, where it is not there yet, and the stub libraries.

    Raises:
        UnavailableError: pip cannot fetch or install the wheel, or there is no C compiler.
    """
    if shutil.which("cc") is None:
        raise UnavailableError("no C compiler: `cc` is not on PATH")
    site = folder / "site"
    if not site.is_dir():
        partial = folder / "site.partial"  # a killed run leaves nothing that looks whole
        shutil.rmtree(partial, ignore_errors=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        place = ["--only-binary=:all:", "--target", str(partial), f"{WHEEL}=={version}"]
        done = subprocess.run([*install, *place], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(done.stderr.strip()[-400:])
        partial.rename(site)
    major = version.split(".", maxsplit=1)[0]
    for library in LIBRARIES:
        path = folder / f"lib{library}.so.{major}"
        soname = f"-Wl,-soname,{path.name}"
        subprocess.run(["cc", "-shared", "-fPIC", soname, "-o", path, STUB], check=True)
    return _dump("tensorrt_bindings", {"PYTHONPATH": str(site), "LD_LIBRARY_PATH": str(folder)})


def api_of_installed(module: str) -> Api:
    """Return the API of a module of this environment."""
    return _dump(module, {})


def _dump(module: str, env: Mapping[str, str]) -> Api:
    command = [sys.executable, __file__, module]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def _members(module: Any) -> dict[str, dict[str, str]]:
    found = {"": dict.fromkeys(dir(module), "")}
    waiting = [(name, value) for name, value in vars(module).items() if inspect.isclass(value)]
    while waiting:
        name, value = waiting.pop()
        found[name] = {}
        for member in dir(value):
            static = inspect.getattr_static(value, member)
            getter = static.fget if isinstance(static, property) else static
            found[name][member] = getattr(getter, "__doc__", None) or ""
            if inspect.isclass(static) and not member.startswith("_"):
                waiting.append((f"{name}.{member}", static))
    return found


if __name__ == "__main__":
    json.dump(_members(importlib.import_module(sys.argv[1])), sys.stdout)
