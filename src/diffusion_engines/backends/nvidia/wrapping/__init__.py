"""Wrap a plan for PyTorch: as TorchScript, as an exported program, or both, by torch-tensorrt."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from diffusion_engines.backends.nvidia.wrapping.distribution import check_series, wrap_fingerprint
from diffusion_engines.backends.nvidia.wrapping.exported_program import write_program
from diffusion_engines.backends.nvidia.wrapping.torchscript import write_torchscript
from diffusion_engines.backends.nvidia.wrapping.weights import add_weights
from diffusion_engines.manifests import Engine

__all__ = ["KEYS", "add_weights", "wrap_plan"]

# What the target's setting `wrap` can name: what writes the file, and where the manifest has its
# name.
_WRITERS = {
    "torchscript": (write_torchscript, "file"),
    "exported_program": (write_program, "program"),
}
KEYS = {kind: key for kind, (_, key) in _WRITERS.items()}


def wrap_plan(
    folder: Path, manifest: Engine, backend: str, wrap: Collection[str]
) -> dict[str, str]:
    """Write the wraps asked for beside a plan; return their files and what they depend on.

    Call it only after the backend's ``check_loadable``.

    Raises:
        HardwareError: torch-tensorrt is missing.
        FingerprintError: it is for another TensorRT than the plan.
        BuildError: a wrap could not be written, or PyTorch could not run it.
    """
    found = wrap_fingerprint(backend, wrap)
    if wrap:
        check_series(manifest, backend, found)
    for kind in wrap:
        write, key = _WRITERS[kind]
        found[key] = write(folder, manifest, backend)
    return found
