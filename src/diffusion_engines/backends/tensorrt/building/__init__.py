"""Build ``engine.plan`` with TensorRT: by ``trtexec`` where it is on PATH, else by its Python API.

From TensorRT 10 on the network is strongly typed: each layer runs in the precision that the graph
says. Before, the builder chooses among the precisions allowed. What came of it is read from the
engine's layer information.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusion_engines.backends.base import BuildResult, Graph
from diffusion_engines.backends.nvidia.building import ENGINE, check_dtypes
from diffusion_engines.backends.nvidia.building.stand_in import buildable
from diffusion_engines.backends.tensorrt.building.layers import (
    LAYERS,
    has_layers,
    precisions_of_graph,
    read_layers,
)
from diffusion_engines.backends.tensorrt.building.python import build_with_python
from diffusion_engines.backends.tensorrt.building.trtexec import (
    STRONGLY_TYPED,
    Version,
    find_trtexec,
    format_version,
    trtexec_command,
)
from diffusion_engines.backends.tensorrt.building.versions import builder_version, library
from diffusion_engines.backends.tensorrt.settings import TensorRTBuild, TensorRTTarget
from diffusion_engines.backends.timing import TIMING_CACHE, check_timing_cache
from diffusion_engines.errors import BuildError
from diffusion_engines.processes import run_logged


def build(
    graph: Graph, folder: Path, target: TensorRTTarget, timing_cache: Path | None = None
) -> BuildResult:
    """Build ``engine.plan`` from a graph by ``trtexec`` where it is on PATH, else by Python.

    As :func:`build_with`.
    """
    return build_with(find_trtexec(), graph, folder, target, timing_cache)


def build_with(
    trtexec: tuple[Path, Version] | None,
    graph: Graph,
    folder: Path,
    target: TensorRTTarget,
    timing_cache: Path | None = None,
) -> BuildResult:
    """Build ``engine.plan`` from a graph, with its layer information and timing cache.

    Args:
        trtexec: as ``find_trtexec`` returns it; None: the Python API builds.
        graph: to build; for stripped weights, its structure is enough.
        folder: gets the engine and, where asked for, ``layers.json`` and ``timing.cache``.
        target: builder settings.
        timing_cache: of an earlier build with the same fingerprint, if there is one.

    Raises:
        BuildError: TensorRT refused the graph, failed or crashed, or runs it in another precision.
    """
    settings = target.build
    if settings.timing_cache and timing_cache is not None and timing_cache.is_file():
        (folder / TIMING_CACHE).write_bytes(timing_cache.read_bytes())
    version = builder_version(trtexec)
    with buildable(graph, folder, settings.weights) as filled:
        if trtexec:
            log = _build_with_trtexec(trtexec[0], version, filled, folder, settings)
            builder = f"trtexec {format_version(version)}"
        else:
            trt = library()
            log = build_with_python(trt, version, filled, folder, settings)
            builder = f"tensorrt {trt.__version__} (Python builder)"
    path = folder / ENGINE
    if not path.is_file() or path.stat().st_size == 0:
        raise BuildError(
            f"{builder} wrote no engine of {graph.path}",
            expected=str(path),
            found="an empty file" if path.is_file() else "nothing",
            fix="free some disk space; the log ends with:\n" + log[-800:],
        )
    layers, precisions = read_layers(folder / LAYERS) if has_layers(settings) else ({}, {})
    check_precision_of_engine(graph, version, settings, precisions)
    if settings.timing_cache:
        check_timing_cache(folder / TIMING_CACHE, builder)
    return BuildResult(ENGINE, builder, f"built by {builder}\n{log}", layers, precisions)


def check_precision_of_engine(
    graph: Graph, version: Version, build: TensorRTBuild, precisions: Mapping[str, int]
) -> None:
    """Compare the dtypes of an engine's layers with the precision asked for.

    Raises:
        BuildError: most layers have another one, or the engine does not tell.
    """
    if precisions:
        check_dtypes(graph, precisions)
    elif version >= STRONGLY_TYPED:
        # Names alone. A strongly typed engine has the precisions of its graph.
        check_dtypes(graph, precisions_of_graph(graph.path))
    else:
        raise BuildError(
            f"TensorRT {format_version(version)} chose the precisions of {graph.path} and does not "
            "tell",
            expected="layer information with dtypes",
            found=f"profiling_verbosity {build.profiling_verbosity}",
            fix="set targets.*.build.profiling_verbosity=detailed (conf/build/tensorrt.yaml)",
        )


def _build_with_trtexec(
    trtexec: Path, version: Version, graph: Graph, folder: Path, build: TensorRTBuild
) -> str:
    command = trtexec_command(
        trtexec,
        version,
        graph=graph,
        plan=folder / ENGINE,
        layers=folder / LAYERS if has_layers(build) else None,
        timing_cache=folder / TIMING_CACHE if build.timing_cache else None,
        build=build,
    )
    path = folder / "trtexec.log"
    log = run_logged(
        command,
        path,
        what=f"trtexec {format_version(version)}, building {graph.path}",
        fix="its message above names the layer or the option; more GPU memory is the other usual\n"
        "cause (targets.*.build.workspace_mib limits it)",
    )
    path.unlink()
    # trtexec locks its cache with a file that it leaves behind.
    (folder / f"{TIMING_CACHE}.lock").unlink(missing_ok=True)
    return log
