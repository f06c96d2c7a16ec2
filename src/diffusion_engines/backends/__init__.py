"""What builds and runs engines: one module per backend, imported only when it is used.

Each module has the same functions and one constant::

    PRECISIONS: tuple[str, ...]
    fingerprint(target) -> dict        # raises HardwareError where it cannot build
    wrap_fingerprint(target) -> dict   # what wrap depends on beyond the engine
    build(onnx, folder, target, inputs, precision) -> BuildResult
    wrap(folder, manifest) -> dict     # adds to a bundle; returns what loading that depends on
    load(folder, manifest, device, cuda_graph=False) -> torch.nn.Module
    check_loadable(manifest) -> None   # raises FingerprintError before anything is deserialized
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines.errors import BuildError, ConfigError, HardwareError

BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class BuildResult:
    """What a build leaves behind besides the engine's files.

    Attributes:
        engine: name of the engine's main file in the folder.
        builder: what built it, with its version.
        log: what the builder printed.
        layers: how many layers it took, by type.
        precisions: how many of the graph's floating-point tensors have each dtype.
    """

    engine: str
    builder: str
    log: str
    layers: dict[str, int]
    precisions: dict[str, int]


def backend(name: str) -> Any:
    """Return a backend's module.

    Raises:
        ConfigError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"no such backend: {name}", expected=", ".join(BACKENDS), found=name)
    return importlib.import_module(f"diffusion_engines.backends.{name}")


def require(module: str, install: str) -> Any:
    """Import an optional library.

    Raises:
        HardwareError: it is not installed, or one of its own libraries is missing; says how to
            install it.
    """
    if importlib.util.find_spec(module) is None:
        raise HardwareError(
            f"the library {module} is not installed here",
            expected=f"an importable {module}",
            found="nothing of that name",
            fix=f"`{install}`; or take engines that others built: `dvc pull`",
        )
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # the bindings without the library that they bind
        raise HardwareError(
            f"the library {module} cannot be loaded here",
            expected=f"an importable {module}",
            found=f"{type(error).__name__}: {error}",
            fix=f"`{install}` again, or use one of NVIDIA's containers",
        ) from error


def check_precision(name: str, precision: str, backend_name: str) -> None:
    """Raise BuildError where a backend does not have the precision of an engine."""
    if precision not in (known := backend(backend_name).PRECISIONS):
        raise BuildError(
            f"engines.{name}.precision: the backend {backend_name} has no {precision}",
            expected=", ".join(known),
            found=precision,
            fix="choose another precision in conf/fleet/, or another target",
        )


def check_dtypes(onnx: Path, precision: str, found: dict[str, int]) -> None:
    """Raise BuildError where an "fp16" engine runs in fp32, which builders do without a word.

    Of a quantized graph, only the layers that were not kept in its source's precision have the
    lower one, so that any will do; that they are those asked for, the stage `quantize` checks.
    """
    dtype = "fp16" if precision == "fp16-mixed" else precision
    quantized = precision in ("int8", "fp8", "fp16-mixed")
    needed = 0 if quantized else sum(found.values()) / 2
    if found.get(dtype, 0) <= needed:
        raise BuildError(
            f"the engine of {onnx} is not what was asked for",
            expected=f"{'some' if quantized else 'mostly'} {dtype}",
            found=", ".join(f"{count} × {dtype}" for dtype, count in sorted(found.items())),
            fix="look at the export: the precision is a property of the graph",
        )
