"""A bundle: an engine with a manifest, self-contained, checked before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.backends import backend
from diffusion_engines.files import copy_files, read_manifest, write_manifest

if TYPE_CHECKING:
    from diffusion_engines.runtime.shapes import CheckedEngine


def wrap_engine(engine: Path, folder: Path) -> None:
    """Copy an engine into ``folder`` with everything that loading it elsewhere takes.

    Raises:
        IntegrityError: the engine is damaged.
    """
    manifest = read_manifest(engine, "engine")
    copy_files(engine, folder)
    info = {key: value for key, value in manifest.items() if key not in ("files", "kind")}
    write_manifest(folder, "bundle", info)


def load_bundle(folder: Path, device: str = "cpu") -> CheckedEngine:
    """Return a bundle's engine as a module that runs on tensors of ``device``.

    The hash of every file and then the fingerprint are compared first: the runtimes answer a
    damaged or foreign engine with a crash. Called with a size that the engine was not built for,
    the module raises ShapeError.

    Raises:
        IntegrityError: a file is missing or altered.
        FingerprintError: the engine was built for another machine or library version.
        HardwareError: the backend's library or GPU is missing here.
    """
    manifest = read_manifest(folder, "bundle")
    module = backend(manifest["backend"])
    module.check_loadable(manifest)
    from diffusion_engines.runtime.shapes import CheckedEngine

    return CheckedEngine(module.load(folder, manifest, device), manifest)


def is_device(device: Any, built_for: str) -> bool:
    """Whether a PyTorch device, or its name, is the one that an engine runs on.

    With an index it is the first GPU, which is the one that backends take.
    """
    return str(device) in (built_for, f"{built_for}:0")


def engine_device(manifest: dict[str, Any]) -> str:
    """Return the PyTorch device that a bundle's engine was built for: ``cpu`` or ``cuda``."""
    # Only targets that can be built for either say so.
    return manifest["settings"].get("device", "cuda")
