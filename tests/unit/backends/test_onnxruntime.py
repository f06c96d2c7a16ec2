"""ONNX Runtime's engines: equal bytes for equal graphs, outputs in the order of their numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from diffusion_engines.backends import backend
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from tests.conftest import ROOT, graph_of
from tests.manifests import built_manifest, graph_manifest

CPU = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild("all", tf32=False))
BRANCHES = 24
BUILD = """
import sys
from pathlib import Path
from tests.unit.backends.test_onnxruntime import CPU, backend, graph_of
backend("onnxruntime").build(graph_of(Path(sys.argv[1]), []), Path(sys.argv[2]), CPU)
"""


def save_convolutions(path: Path) -> None:
    """A graph whose convolutions get another layout, each read by an operator without one."""
    shape, ones = [1, 16, 8, 8], np.ones((16, 16, 3, 3), np.float32)
    nodes, outputs, weights = [], [], []
    for index in range(BRANCHES):
        nodes += [
            helper.make_node(
                "Conv", ["input_0", f"weight_{index}"], [f"conv_{index}"], pads=[1, 1, 1, 1]
            ),
            helper.make_node("Cos", [f"conv_{index}"], [f"output_{index}"]),
        ]
        weights.append(numpy_helper.from_array(ones * index, f"weight_{index}"))
        outputs.append(helper.make_tensor_value_info(f"output_{index}", TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("input_0", TensorProto.FLOAT, shape)],
        outputs,
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


def test_two_processes_build_equal_bytes(tmp_path: Path) -> None:
    """ONNX Runtime numbers the nodes that change a layout in the order of their addresses."""
    save_convolutions(tmp_path / "model.onnx")
    engines = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", BUILD, str(tmp_path / "model.onnx"), str(tmp_path / name)]
        subprocess.run(command, check=True, cwd=ROOT)
        engines.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert sorted(engines[0]) == ["engine.onnx", "engine.onnx.data"]
    assert engines[0] == engines[1]
    kinds = [node.op_type for node in onnx.load_from_string(engines[0]["engine.onnx"]).graph.node]
    assert kinds.count("ReorderOutput") == BRANCHES  # or the test shows nothing


def test_tensors_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """As text, output_10 stands before output_2."""
    count = 12
    shape = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    names = [f"input_{index}" for index in range(count)]
    nodes = [helper.make_node("Add", [name, "one"], [name.replace("in", "out")]) for name in names]
    graph = helper.make_graph(
        nodes,
        "numbers",
        [helper.make_value_info(name, shape) for name in sorted(names)],
        [helper.make_value_info(name.replace("in", "out"), shape) for name in sorted(names)],
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    library = backend("onnxruntime")
    engine = tmp_path / "engine"
    engine.mkdir()
    result = library.build(graph_of(tmp_path / "model.onnx", []), engine, CPU)
    manifest = built_manifest("cpu-unet", graph_manifest(), CPU, result)
    module = library.load(engine, manifest, "cpu")
    outputs = module(*(torch.tensor([float(index)]) for index in range(count)))
    assert [output.item() for output in outputs] == [index + 1.0 for index in range(count)]
