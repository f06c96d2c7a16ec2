"""Give layers of a quantized graph their precision back, without quantizing anew.

Calibration looks at the source alone, so scales do not depend on what is kept: one quantized graph
of all layers stands for those of every choice, at a second instead of a minute each. What ModelOpt
quantizes beside layers (a residual's addition) follows the layer before it, which is near to what
ModelOpt does and not the same: a choice has to be quantized and measured once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx

from diffusion_engines.onnx.quantize import LAYERS, dequantized


def restore_layers(
    quantized: onnx.ModelProto, source: onnx.ModelProto, nodes: Collection[str]
) -> onnx.ModelProto:
    """Return a quantized graph in which some layers are as they are in its source.

    Args:
        quantized: a graph with all weights loaded; it stays as it is.
        source: that it was made from, likewise.
        nodes: the names of layers.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    originals = {node.name: node for node in source.graph.node}
    weights = {tensor.name: tensor for tensor in source.graph.initializer}
    producers = {output: node for node in quantized.graph.node for output in node.output}
    inputs = {value.name for value in model.graph.input}
    layer = ""
    for node in model.graph.node:
        if node.op_type in LAYERS:
            layer = node.name
        if layer not in nodes or node.name not in originals:
            continue
        for index, name in enumerate(originals[node.name].input):
            if not dequantized(producers, node.input[index]):
                continue
            if name in weights:
                restored = model.graph.initializer.add()
                restored.CopyFrom(weights[name])
                # The name may be that of the weight in 8 bits now.
                restored.name = node.input[index] = f"{node.name}.{index}.restored"
            elif name in producers or name in inputs:
                node.input[index] = name
            else:  # of a Cast that ModelOpt found needless
                node.input[index] = _before_quantization(producers, node.input[index])
    _remove_unused(model.graph)
    return model


def _before_quantization(producers: Mapping[str, onnx.NodeProto], name: str) -> str:
    while (node := producers.get(name)) is not None and node.op_type != "QuantizeLinear":
        name = node.input[0]
    return name if node is None else node.input[0]


def _remove_unused(graph: onnx.GraphProto) -> None:
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, weights)):
        del field[:]
        field.extend(values)
