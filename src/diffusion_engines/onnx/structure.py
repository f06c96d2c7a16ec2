"""A graph without its weights: operators, shapes, and the constants that shape it.

Fine-tunes of one network have equal structures, byte for byte, so that what is built from a
structure alone fits all of them. Where a constant is taken for structure that training changes, the
structures differ and something is built once more; where one is taken for a weight that it does not
change, each graph brings the same value. Neither makes a result wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper

from diffusion_engines.onnx.graph import DATA, let_others_read

# Inputs that an operator takes a shape, sizes or axes from; parsers want their values.
# https://onnx.ai/onnx/operators/
_SHAPING = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "Upsample": (1,),
}
_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}


def save_with_weights_apart(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph's structure to ``path``, and its weights into one file beside it.

    Together they are an ordinary graph with external data; the first alone is its structure.
    """
    path.with_name(DATA).unlink(missing_ok=True)  # onnx appends to a file that exists
    shaping = _shaping_constants(model.graph)
    for tensor in model.graph.initializer:
        if tensor.name not in shaping and _is_weight(tensor):
            if not tensor.HasField("raw_data"):  # the only form in which onnx puts data apart
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
            external_data_helper.set_external_data(tensor, location=DATA)
    onnx.save(model, path)
    let_others_read(path)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether training may change it.

    Not of one value alone: those are what operators compute with, and the ones and zeros of a norm
    that has no weights of its own, which TensorRT's plugins copy when they are made.
    """
    if tensor.data_type not in _FLOATS:
        return False
    values = numpy_helper.to_array(tensor).ravel()
    return values.size > 1 and bool(np.any(values != values[0]))


def _shaping_constants(graph: onnx.GraphProto) -> set[str]:
    """Return the names of all that shapes are computed from, up to the shapes of tensors."""
    producers = {name: node for node in graph.node for name in node.output}
    waiting, found = list(_shaping_inputs(graph)), set[str]()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        node = producers.get(name)
        if node is not None and node.op_type not in ("Shape", "Size"):
            waiting.extend(node.input)
    return found


def _shaping_inputs(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        for index in _SHAPING.get(node.op_type, ()):
            if index < len(node.input):
                yield node.input[index]
