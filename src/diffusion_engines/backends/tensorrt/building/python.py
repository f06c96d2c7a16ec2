"""Build with TensorRT's Python API, with the settings that ``trtexec`` would get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_engines.backends.base import Graph
from diffusion_engines.backends.nvidia.building import (
    ENGINE,
    add_profile,
    last_messages,
    parse_graph,
    recording_logger,
    set_weights,
    write_plan,
)
from diffusion_engines.backends.tensorrt.building.layers import LAYERS, has_layers
from diffusion_engines.backends.tensorrt.building.trtexec import (
    ALWAYS_STRONGLY_TYPED,
    Version,
    check_supported,
)
from diffusion_engines.backends.tensorrt.settings import TensorRTBuild
from diffusion_engines.backends.timing import TIMING_CACHE
from diffusion_engines.errors import BuildError

_HARDWARE = {"same_compute_capability": "SAME_COMPUTE_CAPABILITY", "ampere_plus": "AMPERE_PLUS"}


def build_with_python(
    trt: Any, version: Version, graph: Graph, folder: Path, build: TensorRTBuild
) -> str:
    """Build with the Python API, as :func:`trtexec_command` would; return the log.

    Raises:
        BuildError: TensorRT refused the graph, or failed.
    """
    check_supported(build, graph.precision, version)
    library = f"TensorRT {trt.__version__}"
    logger = recording_logger(trt)
    builder, network = parse_graph(trt, library, graph.path, logger, _network_flags(trt, version))
    config = builder.create_builder_config()
    cache = apply_settings(trt, config, build, folder / TIMING_CACHE)
    add_profile(builder, config, graph.inputs)
    write_plan(trt, library, builder, network, config, folder / ENGINE, logger, graph.path)
    if cache is not None:
        (folder / TIMING_CACHE).write_bytes(config.get_timing_cache().serialize())
    if has_layers(build):
        _write_layers(trt, logger, folder, build)
    return "\n".join(logger.lines)


def _network_flags(trt: Any, version: Version) -> int:
    if version >= ALWAYS_STRONGLY_TYPED:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def apply_settings(trt: Any, config: Any, build: TensorRTBuild, timing_cache: Path) -> Any:
    """Set a builder config to conf/build/tensorrt.yaml; return its timing cache, if it has one."""
    config.builder_optimization_level = build.optimization_level
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, build.profiling_verbosity.upper())
    if build.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, build.workspace_mib << 20)
    if build.max_aux_streams is not None:
        config.max_aux_streams = build.max_aux_streams
    if build.hardware_compatibility != "none":
        config.hardware_compatibility_level = getattr(
            trt.HardwareCompatibilityLevel, _HARDWARE[build.hardware_compatibility]
        )
    flags = trt.BuilderFlag
    if not build.tf32:
        config.clear_flag(flags.TF32)  # the builder has it on
    if build.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if build.exclude_lean_runtime:
        config.set_flag(flags.EXCLUDE_LEAN_RUNTIME)
    set_weights(trt, config, build.weights)
    if not build.timing_cache:
        return None  # the builder has one for this build alone, as in trtexec
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _write_layers(trt: Any, logger: Any, folder: Path, build: TensorRTBuild) -> None:
    runtime = trt.Runtime(logger)
    if build.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine((folder / ENGINE).read_bytes())
    if engine is None:
        raise BuildError(
            "TensorRT cannot load the engine that it has just built",
            found=last_messages(logger),
            fix="the log above says why; GPU memory is the usual cause",
        )
    inspector = engine.create_engine_inspector()
    (folder / LAYERS).write_text(
        inspector.get_engine_information(trt.LayerInformationFormat.JSON) + "\n"
    )
