"""Which layers get 8 bits: groups, the search, and what is written of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from diffusion_engines.errors import ConfigError, OutOfTimeError
from diffusion_engines.lowering.groups import layer_groups
from diffusion_engines.lowering.option import Choice, check_option, write_option, write_tables
from diffusion_engines.lowering.search import Lowered, Measured, search
from diffusion_engines.onnx.quantize import kept_nodes, layer_names, quantized_layers
from diffusion_engines.onnx.restoring import restore_layers
from diffusion_engines.parity.distances import Difference

BASE = 1e-3
# Squared errors that groups add at the two calls, and bytes that they save.
COSTS = {"a": (1e-4, 4e-4), "b": (1e-6, 1e-6), "c": (1e-2, 1e-2), "d": (4e-6, 1e-6)}
BYTES = {"a": 400, "b": 100, "c": 1000, "d": 300}


class Fake:
    """Measures as if errors were independent, and counts; after ``limit`` its time is up."""

    def __init__(self, limit: int = 1000, extra: Sequence[tuple[Lowered, float]] = ()) -> None:
        self.limit, self.extra = limit, dict(extra)
        self.found: dict[Lowered, Measured] = {}

    def __call__(self, lowered: Lowered) -> Measured:
        if lowered not in self.found:
            if len(self.found) >= self.limit:
                raise OutOfTimeError("time is up")
            errors = [
                math.sqrt(
                    BASE**2
                    + sum(COSTS[name][call] for name in lowered)
                    + self.extra.get(lowered, 0.0)
                )
                for call in (0, 1)
            ]
            size = 2000 - sum(BYTES[name] for name in lowered)
            calls = tuple(Difference(error, error, 1 - error, 0) for error in errors)
            self.found[lowered] = Measured(calls, size)
        return self.found[lowered]


def below(allowed: float) -> Callable[[Measured], bool]:
    return lambda measured: measured.rel_l2 <= allowed


@pytest.mark.parametrize(
    ("allowed", "chosen"),
    [
        (2e-3, {"b"}),  # d fits in as little, and not beside it
        (3e-3, {"d", "b"}),
        (2.1e-2, {"d", "b", "a"}),
        (1.0, {"a", "b", "c", "d"}),
    ],
)
def test_as_many_groups_as_the_gate_allows(allowed: float, chosen: set[str]) -> None:
    fake = Fake()
    found = search(list(COSTS), fake, fake, below(allowed))
    assert found is not None
    assert set(found.chosen.lowered) == chosen
    assert found.chosen.measured is not None
    assert found.chosen.measured.rel_l2 <= allowed
    # The cheapest for its bytes first; independent errors are predicted as they are measured.
    assert list(found.alone) == ["b", "d", "a", "c"]
    assert [len(point.lowered) for point in found.curve] == [0, 1, 2, 3, 4]
    for point in found.curve:
        assert point.measured is not None
        assert point.predicted == pytest.approx(point.measured.rel_l2)


def test_a_later_group_is_taken_where_an_earlier_one_is_refused() -> None:
    # `d` is cheap alone, and not beside `b`.
    worse = [(frozenset(names), 1.0) for names in ("bd", "bda", "bdac")]
    found = search(list(COSTS), Fake(extra=worse), Fake(), below(2.1e-2))
    assert found is not None
    assert found.chosen.lowered == ("b", "a")
    # As it is built, `a` is too much beside `b`.
    as_built = Fake(extra=[(frozenset("ba"), 1.0)])
    found = search(list(COSTS), Fake(extra=worse), as_built, below(2.1e-2))
    assert found is not None
    assert found.chosen.lowered == ("b",)
    assert search(list(COSTS), Fake(), Fake(), below(1.1e-3)) is None


def test_a_search_that_was_stopped_goes_on_with_what_it_measured() -> None:
    expected = search(list(COSTS), Fake(), Fake(), below(2e-3))
    fake, found, stopped = Fake(limit=0), None, 0
    while found is None:
        fake.limit += 3
        try:
            found = search(list(COSTS), fake, fake, below(2e-3))
        except OutOfTimeError:
            stopped += 1
    assert stopped == 2
    assert expected is not None
    assert found.chosen == expected.chosen
    # The rest of the curve was left for want of time: predicted, and said not to be measured.
    unmeasured = [point for point in found.curve if point.measured is None]
    assert unmeasured
    assert all(point.passes is None and point.predicted > 0 for point in unmeasured)


LAYERS = {
    "n0": "network.conv_in.weight",
    "n1": "network.down.0.resnets.0.conv1.weight",
    "n2": "network.down.0.resnets.0.time_emb_proj.weight",
    "n3": "network.down.0.attentions.0.val_7",
    "n4": "network.up.0.resnets.0.conv1.weight",
    "n5": "network.conv_out.weight",
}


@pytest.mark.parametrize("depth", [1, 2, 3, 4, None])
def test_the_patterns_of_groups_name_their_layers_and_no_others(depth: int | None) -> None:
    groups = layer_groups(LAYERS, [r"\.conv_in\.", r"\.time_emb_proj\."], LAYERS, depth)
    assert sorted(node for group in groups for node in group.nodes) == sorted(LAYERS)
    for group in groups:
        named = {node for node, name in LAYERS.items() if re.search(group.pattern, name)}
        assert named == group.nodes
    at_least = {1: 3, 2: 4, 3: 5}
    assert len(groups) >= at_least.get(depth or 4, 5)


def test_what_cannot_be_lowered_makes_no_group() -> None:
    groups = layer_groups(LAYERS, [r"\.conv_in\."], {"n1", "n5"}, 3)
    assert {node for group in groups for node in group.nodes} == {"n1", "n2", "n3", "n5"}


def qdq() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Two MatMuls, the second without its weight's name; in fp32, and in 8 bits."""
    value = helper.make_tensor_value_info
    x, y = value("x", TensorProto.FLOAT, [2, 2]), value("y", TensorProto.FLOAT, [2, 2])
    weights = {
        "net.block.0.linear.weight": np.array([[0.31, -0.52], [0.77, 0.13]], np.float32),
        "val_1": np.array([[0.91, 0.27], [-0.44, 0.68]], np.float32),
    }
    source = [
        helper.make_node("MatMul", ["x", "net.block.0.linear.weight"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "val_1"], ["y"], "second"),
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    lowered, stored = [], [numpy_helper.from_array(np.array(0.1, np.float32), "scale")]
    for node in source:
        low = onnx.NodeProto()
        low.CopyFrom(node)
        for index, name in enumerate(node.input):
            q, dq = f"{name}_q", f"{name}_dq"
            if name in weights:
                stored.append(numpy_helper.from_array((weights[name] / 0.1).astype(np.int8), q))
            else:
                lowered.append(helper.make_node("QuantizeLinear", [name, "scale"], [q]))
            lowered.append(helper.make_node("DequantizeLinear", [q, "scale"], [dq]))
            low.input[index] = dq
        lowered.append(low)

    def model(nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> onnx.ModelProto:
        graph = helper.make_graph(nodes, "g", [x], [y], tensors)
        opset = [helper.make_opsetid("", 18)]
        made = helper.make_model(graph, opset_imports=opset, ir_version=9)
        onnx.checker.check_model(made, full_check=True)
        return made

    return model(source, constants), model(lowered, stored)


def run(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = np.array([[0.23, -0.41], [0.58, 0.19]], np.float32)
    return np.asarray(session.run(None, {"x": feed})[0])


def test_a_restored_layer_is_that_of_the_source() -> None:
    source, lowered = qdq()
    assert quantized_layers(lowered) == {"first", "second"}
    assert (run(restore_layers(lowered, source, {"first", "second"})) == run(source)).all()
    half = restore_layers(lowered, source, {"first"})
    assert quantized_layers(half) == {"second"}
    assert "net.block.0.linear.weight_q" not in {t.name for t in half.graph.initializer}
    errors = [np.abs(run(model) - run(source)).max() for model in (half, lowered)]
    assert errors[0] > 0
    assert (run(restore_layers(lowered, source, set())) == run(lowered)).all()


def test_a_weight_without_a_name_is_named_after_its_module() -> None:
    source, _ = qdq()
    assert layer_names(source) == {
        "first": "net.block.0.linear.weight",
        "second": "net.block.0.val_1",
    }
    assert kept_nodes(source, [r"^net\.block\.0\."]) == ["first", "second"]
    assert kept_nodes(source, [r"\.linear\."]) == ["first"]


def test_a_choice_is_an_option_of_conf_with_its_curve(tmp_path: Path) -> None:
    found = search(list(COSTS), Fake(limit=9), Fake(), below(2e-3))
    assert found is not None
    assert found.chosen.measured is not None
    built = found.chosen.measured
    kept = [r"^a\.it's", r"\.c\."]
    choice = Choice("unet", "int8", 2e-3, found, built, found.chosen.lowered, kept)
    path = tmp_path / "unet-int8.yaml"
    check_option(path)
    write_option(path, choice, "default")
    first = path.read_bytes()
    check_option(path)
    write_option(path, choice, "default")
    assert path.read_bytes() == first
    read = yaml.safe_load(first)
    assert read == {"defaults": ["default", "_self_"], "int8": {"kept": {"unet": kept}}}
    text = first.decode()
    assert "# 1 of 4 groups of layers; relative L2 error at the worst of 2 recorded calls" in text
    assert re.search(r"#      3 +- +- +2\.0\de-02  a", text)  # for which there was no time

    write_tables(tmp_path / "tables", choice)
    assert len((tmp_path / "tables/groups.csv").read_text().splitlines()) == 1 + 4 * 2
    assert (tmp_path / "tables/search.png").stat().st_size > 10_000

    (tmp_path / "mine.yaml").write_text("# Mine.\nint8: {}\n")
    with pytest.raises(ConfigError, match="not one that a search wrote"):
        check_option(tmp_path / "mine.yaml")
