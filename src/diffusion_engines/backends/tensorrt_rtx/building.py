"""Build with TensorRT-RTX, for every compute capability of a target, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_engines.backends import require
from diffusion_engines.backends.base import BuildResult, Graph
from diffusion_engines.backends.nvidia.building import (
    ENGINE,
    add_profile,
    check_dtypes,
    layers_of_network,
    parse_graph,
    recording_logger,
    set_weights,
    write_plan,
)
from diffusion_engines.backends.nvidia.building.stand_in import buildable
from diffusion_engines.backends.tensorrt_rtx.settings import RTX_CAPABILITIES, TensorRTRTXTarget
from diffusion_engines.errors import HardwareError

_TILING = {"none": "NONE", "fast": "FAST", "moderate": "MODERATE", "full": "FULL"}


def library() -> Any:
    """Return the module tensorrt_rtx.

    Raises:
        HardwareError: it is not installed.
    """
    return require("tensorrt_rtx", "pip install tensorrt-rtx")


def capability_of(trt: Any, name: str) -> Any:
    """Return the library's value for a compute capability such as ``8.9``.

    Raises:
        HardwareError: it has none.
    """
    value = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}", None)
    if value is None:
        raise HardwareError(
            f"TensorRT-RTX {trt.__version__} has no compute capability {name}",
            expected=", ".join(RTX_CAPABILITIES),
            found=name,
            fix="correct targets.*.compute_capabilities in conf/target/; data-centre GPUs such as\n"
            "H100 (9.0) need the backend tensorrt",
        )
    return value


def build(graph: Graph, folder: Path, target: TensorRTRTXTarget) -> BuildResult:
    """Build ``engine.plan`` from a graph, for every compute capability of the target.

    The network is strongly typed: every layer runs in the precision that the graph says.

    Raises:
        BuildError: TensorRT-RTX refused the graph, or failed, or would run it in another precision.
    """
    trt = library()
    name = f"TensorRT-RTX {trt.__version__}"
    logger = recording_logger(trt)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    with buildable(graph, folder, target.build.weights) as filled:
        builder, network = parse_graph(trt, name, filled.path, logger, flags)
        config = builder_config(trt, builder, target)
        add_profile(builder, config, graph.inputs)
        layers, precisions = layers_of_network(network)
        check_dtypes(graph, precisions)
        write_plan(trt, name, builder, network, config, folder / ENGINE, logger, graph.path)
    return BuildResult(
        ENGINE, f"tensorrt_rtx {trt.__version__}", "\n".join(logger.lines), layers, precisions
    )


def builder_config(trt: Any, builder: Any, target: TensorRTRTXTarget) -> Any:
    """Return a config of a builder with the target's settings (conf/build/tensorrt_rtx.yaml)."""
    config = builder.create_builder_config()
    set_weights(trt, config, target.build.weights)
    config.num_compute_capabilities = len(target.compute_capabilities)
    for index, name in enumerate(target.compute_capabilities):
        config.set_compute_capability(capability_of(trt, name), index)
    settings = target.build
    if settings.max_aux_streams is not None:
        config.max_aux_streams = settings.max_aux_streams
    config.tiling_optimization_level = getattr(
        trt.TilingOptimizationLevel, _TILING[settings.tiling_optimization_level]
    )
    config.profiling_verbosity = getattr(
        trt.ProfilingVerbosity, settings.profiling_verbosity.upper()
    )
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # the builder has it on
    return config
