"""A bundle: an engine with a manifest, self-contained, checked before it is loaded.

`diffusion-engines check-bundle artifacts/bundles/a10/unet` only checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines import manifests
from diffusion_engines.backends import backend, backend_names
from diffusion_engines.backends.timing import TIMING_CACHE
from diffusion_engines.errors import (
    ConfigError,
    DiffusionEnginesError,
    FingerprintError,
    HardwareError,
    IntegrityError,
)
from diffusion_engines.families import family_of
from diffusion_engines.files import MANIFEST, copy_files
from diffusion_engines.manifests import Bundle, Engine
from diffusion_engines.precisions import PRECISIONS

if TYPE_CHECKING:
    from torch import nn

    from diffusion_engines.runtime.shapes import CheckedEngine

# Of use to builds alone.
_BUILD_FILES = (MANIFEST, TIMING_CACHE)
# What a manifest says twice, of the engine and of its graph.
_OF_THE_GRAPH = ("component", "precision", "inputs", "outputs", "guidance")


def wrap_engine(
    engine: Path, folder: Path, weights: Path | None = None, graph: Path | None = None
) -> None:
    """Copy an engine into ``folder`` with everything that loading it elsewhere takes.

    Args:
        engine: its folder.
        folder: of the bundle.
        weights: a diffusers folder; of use where the engine is of an exported program, which has
            no weights.
        graph: a folder of artifacts/onnx/; of use where the engine is of a graph's structure alone.

    Raises:
        IntegrityError: the engine or the weights are damaged.
        BuildError: the engine is of another structure than the graph.
        BuildError, FingerprintError, HardwareError: it cannot be wrapped as TorchScript here.
    """
    manifest = manifests.read(engine, Engine)
    copy_files(engine, folder, skip=_BUILD_FILES)
    added = None
    if manifest.onnx.without_weights:
        added = weights if _of_a_program(manifest) else graph
    torchscript = backend(manifest.backend).wrap(folder, manifest, added)
    if added is not None:
        manifest = _with_origin(manifest, added)
    manifests.write(folder, manifests.bundle_from_engine(manifest, torchscript))


def _of_a_program(manifest: Engine) -> bool:
    return manifest.onnx.graph_format == "exported_program"


def _with_origin(manifest: Engine, added: Path) -> Engine:
    """Return the manifest of an engine with what the weights that were added say of themselves."""
    if _of_a_program(manifest):
        network = added / family_of(added).component(manifest.component).folder
        return manifests.engine_with_weights(manifest, manifests.read(network, manifests.Weights))
    graph = manifests.read(added, manifests.Graph, verify=False)
    return manifests.engine_with_graph(manifest, graph)


def load_bundle(
    folder: Path, device: str = "cpu", *, cuda_graph: bool = False, threads: int | None = None
) -> CheckedEngine:
    """Return a bundle's engine as a module that runs on tensors of ``device``.

    The hash of every file and then the fingerprint are compared first: the runtimes answer a
    damaged or foreign engine with a crash. Called with a size that the engine was not built for,
    the module raises ShapeError.

    Args:
        folder: the bundle.
        device: such as ``cpu`` or ``cuda``.
        cuda_graph: record a CUDA graph at the first call and replay it, where the backend can.
        threads: of the CPU for each call, and from now on of all that PyTorch does in this process;
            None: as many as the process may use, and PyTorch's stay as they are.

    Raises:
        ConfigError: there cannot be so many threads.
        IntegrityError: a file is missing or altered.
        FingerprintError: the engine was built for another machine or library version.
        HardwareError: the backend's library or GPU is missing here.
    """
    manifest = check_bundle(folder)
    from diffusion_engines.runtime.shapes import CheckedEngine

    if threads is not None:
        _set_threads(threads)
    engine = backend(manifest.backend).load(
        folder, manifest, device, cuda_graph=cuda_graph, threads=threads
    )
    return CheckedEngine(engine, manifest)


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ConfigError(
            "threads: there cannot be so few",
            expected="1 or more; None: as many as the process may use",
            found=str(threads),
        )
    torch.set_num_threads(threads)


def load_torchscript(folder: Path) -> nn.Module:
    """Return a bundle's ``engine.ts``, loaded as any TorchScript file, after the same checks.

    Raises:
        as :func:`load_bundle`; FingerprintError also for another PyTorch or torch-tensorrt than
        the file was written with, or where there is no such file.
    """
    from diffusion_engines.backends.nvidia.wrapping import torchscript

    return torchscript.load_torchscript(*_wrapped(folder, "torchscript"))


def load_exported_program(folder: Path) -> nn.Module:
    """Return a bundle's ``engine.pt2``, loaded as any exported program, after the same checks.

    Raises:
        as :func:`load_torchscript`.
    """
    from diffusion_engines.backends.nvidia.wrapping import exported_program

    path, _ = _wrapped(folder, "exported_program")
    return exported_program.load_program(path)


def _wrapped(folder: Path, kind: str) -> tuple[Path, str]:
    """Return a wrap of a bundle that can be loaded here, and the backend of its plan."""
    from diffusion_engines.backends.nvidia.wrapping import KEYS
    from diffusion_engines.backends.nvidia.wrapping.distribution import check_abi

    manifest = check_bundle(folder)
    return folder / check_abi(manifest, manifest.backend, KEYS[kind], kind), manifest.backend


def check_bundle(folder: Path) -> Bundle:
    """Return the manifest of a bundle that this machine can load; nothing is deserialized.

    Raises:
        as :func:`load_bundle`; the remedy names other bundles of the component that fit.
    """
    manifest = manifests.read(folder, Bundle)
    _check_engine(folder, manifest)
    try:
        backend(manifest.backend).check_loadable(manifest)
    except (FingerprintError, HardwareError) as error:
        fitting = fitting_bundles(folder)
        if not fitting:
            raise
        raise type(error)(
            error.problem,
            expected=error.expected,
            found=error.found,
            fix=f"{error.fix}\nThis machine can load: {', '.join(map(str, fitting))}",
        ) from error
    return manifest


def _check_engine(folder: Path, manifest: Bundle) -> None:
    """Raise IntegrityError where a manifest says what no build writes: backends rely on it."""
    problem = ""
    if manifest.engine not in manifest.files:
        problem = f"the engine {manifest.engine} is not among its files"
    elif manifest.name != f"{manifest.target}-{manifest.component}":
        problem = f"{manifest.name} for the {manifest.component} of {manifest.target}"
    elif manifest.backend not in backend_names():
        problem = f"no such backend: {manifest.backend}"
    elif manifest.precision not in PRECISIONS:
        problem = f"no such precision: {manifest.precision}"
    elif other := [
        name for name in _OF_THE_GRAPH if getattr(manifest.onnx, name) != vars(manifest)[name]
    ]:
        problem = f"the engine and its graph have other {', '.join(other)}"
    if problem:
        raise IntegrityError(
            f"{folder / MANIFEST} contradicts itself",
            expected="a manifest as `wrap` writes it",
            found=problem,
            fix=f"make it again: `rm -rf {folder}`, then `dvc repro`. On a server: copy the\n"
            "folder again, from a place that you trust",
        )


def fitting_bundles(folder: Path) -> list[Path]:
    """Return the bundles of other targets for the same component that this machine can load."""
    fitting = []
    for path in sorted(folder.absolute().parent.parent.glob(f"*/{folder.name}/{MANIFEST}")):
        if path.parent == folder.absolute():
            continue
        try:
            other = manifests.read(path.parent, Bundle, verify=False)
            backend(other.backend).check_loadable(other)
        except DiffusionEnginesError:
            continue  # it does not fit either
        fitting.append(path.parent)
    return fitting


def is_device(device: Any, built_for: str) -> bool:
    """Whether a PyTorch device, or its name, is the one that an engine runs on.

    With an index it is the first GPU, which is the one that backends take.
    """
    return str(device) in (built_for, f"{built_for}:0")
