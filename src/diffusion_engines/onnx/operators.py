"""Count what a graph is made of: operators, bytes, multiply-accumulates."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path

import onnx
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from diffusion_engines.onnx.statistics import GraphStatistics, Simplification


def graph_statistics(path: Path) -> GraphStatistics:
    """Read the statistics of a graph on disk; its weights are not loaded."""
    model = onnx.load(path, load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    return GraphStatistics(
        operators=dict(sorted(operators.items())),
        nodes=len(model.graph.node),
        bytes=sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
        macs=_macs(model),
    )


def _macs(model: onnx.ModelProto) -> int | None:
    # The weights are external and not loaded; shapes do not depend on them.
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, list[int]] = {i.name: list(i.dims) for i in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = [
            d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim
        ]
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            shapes[node.output[0]] = list(numpy_helper.to_array(node.attribute[0].t).shape)
    total = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        try:
            left, right = shapes[node.input[0]], shapes[node.input[1]]
            out = shapes[node.output[0]]
        except KeyError:
            return None
        if -1 in (*left, *right, *out):
            return None
        total += math.prod(out) * _reduced(node, left, right)
    return total


def _reduced(node: onnx.NodeProto, left: list[int], right: list[int]) -> int:
    """The length of the dot product behind each output element."""
    if node.op_type == "Conv":
        return math.prod(right[1:])  # input channels per group, and the kernel
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return left[0] if transposed else left[1]
    return left[-1]


def render(found: Simplification, title: str) -> str:
    """Return the comparison as a table of text, most frequent operators first."""
    table = Table(title=title)
    table.add_column("operator")
    for column in ("exported", "simplified"):
        table.add_column(column, justify="right")
    for name, *counts in found.rows():
        table.add_row(name, *map(str, counts))
    both = (found.before, found.after)
    table.add_section()
    table.add_row("all operators", *(str(statistics.nodes) for statistics in both))
    table.add_row("megabytes", *(f"{statistics.bytes / 1e6:.1f}" for statistics in both))
    table.add_row("giga MACs", *(_giga(statistics.macs) for statistics in both))
    console = Console(width=64, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def _giga(macs: int | None) -> str:
    return "open shape" if macs is None else f"{macs / 1e9:.3f}"
