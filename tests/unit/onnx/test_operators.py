"""Multiply-accumulates of single operators, by hand, and the table that a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffusion_engines.onnx.graph import save_with_external_data
from diffusion_engines.onnx.operators import graph_statistics, render
from diffusion_engines.onnx.statistics import GraphStatistics, Simplification


def one_node(
    folder: Path, operator: str, shapes: list[list[Any]], out: list[Any], **attributes: Any
) -> Path:
    """A graph of one operator; the first shape is the input's, the others are weights'."""
    weights = [
        numpy_helper.from_array(np.zeros(shape, np.float32), f"w{i}")
        for i, shape in enumerate(shapes[1:])
    ]
    names = ["input_0", *(weight.name for weight in weights)]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["output_0"], **attributes)],
        "g",
        [helper.make_tensor_value_info("input_0", TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info("output_0", TensorProto.FLOAT, out)],
        weights,
    )
    path = folder / "model.onnx"
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("operator", "shapes", "out", "attributes", "macs"),
    [
        # 8 output channels in 2 groups of 4 inputs, kernel 3×3, 10×10 outputs of 2 images
        ("Conv", [[2, 8, 12, 12], [8, 4, 3, 3]], [2, 8, 10, 10], {"group": 2}, 2 * 800 * 36),
        ("Conv", [[1, 4, 8, 8], [16, 4, 1, 1]], [1, 16, 4, 4], {"strides": [2, 2]}, 256 * 4),
        ("Gemm", [[5, 7], [7, 3]], [5, 3], {}, 5 * 3 * 7),
        ("Gemm", [[7, 5], [7, 3]], [5, 3], {"transA": 1}, 5 * 3 * 7),
        ("Gemm", [[5, 7], [3, 7]], [5, 3], {"transB": 1}, 5 * 3 * 7),
        ("MatMul", [[2, 3, 5, 7], [7, 4]], [2, 3, 5, 4], {}, 2 * 3 * 5 * 4 * 7),
        ("Relu", [[2, 3]], [2, 3], {}, 0),
        # an open batch has no number
        ("MatMul", [["batch", 5, 7], [7, 4]], ["batch", 5, 4], {}, None),
    ],
)
def test_macs_of_an_operator(
    tmp_path: Path,
    operator: str,
    shapes: list[list[Any]],
    out: list[Any],
    attributes: dict[str, Any],
    macs: int | None,
) -> None:
    path = one_node(tmp_path, operator, shapes, out, **attributes)
    statistics = graph_statistics(path)
    assert statistics.macs == macs
    assert statistics.operators == {operator: 1}
    assert statistics.bytes == path.stat().st_size


def test_counting_writes_nothing_beside_a_graph_and_reads_no_weights(tmp_path: Path) -> None:
    path = one_node(tmp_path, "MatMul", [[5, 64], [64, 32]], [5, 32])
    save_with_external_data(onnx.load(path), path)
    data = path.with_name("model.onnx.data")
    assert data.is_file()
    data.unlink()  # shapes are known without
    before = tmp_path.stat().st_mtime_ns  # a file that came and went would show here
    assert graph_statistics(path).macs == 5 * 64 * 32
    assert tmp_path.stat().st_mtime_ns == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_the_table_has_both_graphs_the_most_frequent_operator_first() -> None:
    before = GraphStatistics({"Conv": 2, "Identity": 30}, 32, 2_500_000, 1_607_000_000)
    after = GraphStatistics({"Conv": 2, "Mul": 1}, 3, 2_400_000, None)
    table = render(Simplification(before, after), "unet")
    lines = [line.replace("│", " ").split() for line in table.splitlines()]
    rows = [line for line in lines if len(line) >= 3]
    order = [row[0] for row in rows]
    assert order.index("Conv") < order.index("Mul") < order.index("Identity")
    for row in (
        ["Identity", "30", "0"],
        ["Mul", "0", "1"],
        ["all", "operators", "32", "3"],
        ["megabytes", "2.5", "2.4"],
        ["giga", "MACs", "1.607", "open", "shape"],
    ):
        assert row in rows
