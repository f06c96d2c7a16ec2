"""Build with ONNX Runtime: the graph after its optimizations, saved."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from diffusion_engines.backends.base import BuildResult, Graph
from diffusion_engines.backends.onnxruntime.session import library, open_session
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeTarget
from diffusion_engines.errors import BuildError, HardwareError
from diffusion_engines.precisions import of_onnx_dtypes

ENGINE = "engine.onnx"
_DATA = "engine.onnx.data"
_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def build(graph: Graph, folder: Path, target: OnnxRuntimeTarget) -> BuildResult:
    """Optimize a graph for the target and save it as ``engine.onnx`` with external data.

    ONNX Runtime's CPU kernels are fp32: an fp16 graph gets casts around them, and with
    optimizations most of its weights are stored cast. The dtypes in the result show it.

    Two builds of a graph for the CPU have equal bytes, see :func:`_with_names_of_outputs`.

    Raises:
        BuildError: ONNX Runtime refused the graph.
    """
    import onnx

    ort = library(target.device)
    path = folder / ENGINE
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, _LEVELS[target.build.optimization_level]
    )
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", _DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        # From opset 21 on, turning int8 into uint8 forgets the attribute that names the type, and
        # the graph of its own making is refused (1.32).
        ("session.qdqisint8allowed", "1"),
        ("session.disable_prepacking", "1"),  # packing is for running; here it costs memory
    ):
        options.add_session_config_entry(key, value)
    try:
        open_session(ort, graph.path, options, target.device, tf32=target.build.tf32)
    except HardwareError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise BuildError(
            f"ONNX Runtime {ort.__version__} refused {graph.path}",
            found=str(error)[:800],
            fix="try export.exporter=dynamo, or a lower export.opset",
        ) from error
    model = _with_names_of_outputs(onnx.load(path, load_external_data=False))
    path.write_bytes(model.SerializeToString(deterministic=True))
    layers = Counter(node.op_type for node in model.graph.node)
    weights = of_onnx_dtypes(
        onnx.TensorProto.DataType.Name(weight.data_type) for weight in model.graph.initializer
    )
    return BuildResult(ENGINE, f"onnxruntime {ort.__version__}", "", dict(layers), weights)


def _with_names_of_outputs(model: Any) -> Any:
    """Name every node as its first output, whose name is unique, and return the model.

    The pass behind level "all" that chooses layouts (NCHWc) walks a table whose keys are addresses,
    and numbers the nodes that it adds in that order: their names differed from run to run, and
    nothing else. Nothing refers to a node by its name.
    """
    for node in model.graph.node:
        node.name = next(filter(None, node.output), node.name)
    return model
