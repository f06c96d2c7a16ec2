"""Tensors are in the order of their numbers, wherever they are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from diffusion_engines.names import trailing_number
from diffusion_engines.onnx.graph import MODEL
from diffusion_engines.onnx.session import feeds_of
from diffusion_engines.onnx.simplify import relative_l2_between
from diffusion_engines.runtime.calls import Recorder, recorded_calls

COUNT = 12


def test_names_are_in_the_order_of_their_numbers() -> None:
    names = [f"input_{i}" for i in range(COUNT)]
    assert sorted(names, key=trailing_number) == names
    with pytest.raises(ValueError, match="'latents' ends in no number"):
        trailing_number("latents")


def test_a_recording_gives_back_twelve_tensors_in_order(tmp_path: Path) -> None:
    recorder = Recorder(lambda *tensors: tuple(-tensor for tensor in tensors))
    recorder(*(torch.tensor([float(i)]) for i in range(COUNT)))
    recorder.save(tmp_path / "x.safetensors")
    ((inputs, outputs),) = recorded_calls(tmp_path / "x.safetensors")
    assert [float(tensor) for tensor in inputs] == list(range(COUNT))
    assert [float(-tensor) for tensor in outputs] == list(range(COUNT))


def test_a_session_is_fed_by_number() -> None:
    inputs = [SimpleNamespace(name=f"input_{i}", type="tensor(float)") for i in range(COUNT)]
    feeds = feeds_of(inputs[::-1], [np.full(1, i) for i in range(COUNT)])
    assert {name: float(value[0]) for name, value in feeds.items()} == {
        f"input_{i}": i for i in range(COUNT)
    }


def write_multiples(path: Path, outputs: list[int]) -> None:
    """Write a graph whose output ``i`` is ``i + 1`` times its input, declared in this order."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Mul", ["input_0", f"f{i}"], [f"output_{i}"]) for i in outputs],
        "multiples",
        [helper.make_tensor_value_info("input_0", floats, [2, 3])],
        [helper.make_tensor_value_info(f"output_{i}", floats, [2, 3]) for i in outputs],
        [helper.make_tensor(f"f{i}", floats, [1], [i + 1.0]) for i in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)


def test_graphs_are_compared_output_by_output_whatever_their_order(tmp_path: Path) -> None:
    first, second = tmp_path / MODEL, tmp_path / f"other-{MODEL}"
    write_multiples(first, list(range(COUNT)))
    write_multiples(second, list(range(COUNT))[::-1])
    assert relative_l2_between(first, second, seed=0) == 0.0
