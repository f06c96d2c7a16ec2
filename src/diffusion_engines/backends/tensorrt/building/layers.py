"""What an engine really computes in: the precisions in TensorRT's layer information.

Kept beside every engine as ``layers.json``, as ``trtexec --exportLayerInfo`` and the engine
inspector write it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from diffusion_engines.backends.tensorrt.settings import TensorRTBuild
from diffusion_engines.errors import BuildError
from diffusion_engines.precisions import of_onnx_dtypes

LAYERS = "layers.json"
# Where a tensor's dtype stands: up to 10.16 in one field with its format, from 11.0 on in its own.
_DTYPE_FIELDS = ("Datatype", "Format/Datatype")
# "Row major linear FP16 format", "Half", "Thirty-two wide channel vectorized row major Int8 format"
_PATTERNS = (
    ("bf16", re.compile(r"\bbf(loat)?16\b", re.IGNORECASE)),
    ("fp16", re.compile(r"\b(fp16|half|float16)\b", re.IGNORECASE)),
    ("fp32", re.compile(r"\b(fp32|float|float32)\b", re.IGNORECASE)),
    ("int8", re.compile(r"\bint8\b", re.IGNORECASE)),
    ("fp8", re.compile(r"\bfp8\b", re.IGNORECASE)),
)


def has_layers(build: TensorRTBuild) -> bool:
    """Whether an engine tells anything of its layers: with the verbosity "none", nothing.

    What ``trtexec`` and the inspector write then is not documented, so that they are not asked.
    https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/EngineInspector.html
    """
    return build.profiling_verbosity != "none"


def read_layers(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many layers an engine has by type, and output tensors by precision.

    With the verbosity "layer_names_only", TensorRT writes names alone: both are empty then.

    Raises:
        BuildError: the file is not layer information, or it is detailed and tells no dtype: that of
            a release with other words, which must not pass for "names alone".
    """
    try:
        layers = json.loads(path.read_text())["Layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(
            f"{path} is not TensorRT's layer information",
            expected='a JSON object with the key "Layers"',
            found=f"{type(error).__name__}: {error}",
            fix="look at the build log: the builder has stopped before it wrote it",
        ) from error
    detailed = [layer for layer in layers if isinstance(layer, dict)]
    types = Counter(str(layer.get("LayerType", "unknown")) for layer in detailed)
    outputs = [output for layer in detailed for output in layer.get("Outputs", [])]
    if detailed and not any(field in output for output in outputs for field in _DTYPE_FIELDS):
        raise BuildError(
            f"{path} has layers and no dtypes",
            expected=f"outputs with {' or '.join(map(repr, _DTYPE_FIELDS))}",
            found=f"outputs with {', '.join(sorted({*(key for o in outputs for key in o)}))}",
            fix="this TensorRT writes its layer information in another form: report it with\n"
            "layers.json, and build with a release of docs/fleet.md",
        )
    precisions = Counter(found for output in outputs if (found := precision_of(output)))
    return dict(types), dict(precisions)


def precision_of(tensor: Mapping[str, object]) -> str | None:
    """Return the precision of a tensor of the layer information, None for integers and booleans."""
    text = next((str(tensor[field]) for field in _DTYPE_FIELDS if field in tensor), "")
    return next((name for name, pattern in _PATTERNS if pattern.search(text)), None)


def precisions_of_graph(onnx: Path) -> dict[str, int]:
    """Return how many weights of an ONNX graph, scales' zero points included, have a precision."""
    from onnx import TensorProto, load

    weights = load(onnx, load_external_data=False).graph.initializer
    return of_onnx_dtypes(TensorProto.DataType.Name(weight.data_type) for weight in weights)
