"""Lower precisions: calibrated graphs that compute nearly the same, and what must not slip by."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffusion_engines.backends import backend
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from diffusion_engines.backends.tensorrt_rtx.settings import TensorRTRTXBuild, TensorRTRTXTarget
from diffusion_engines.config import (
    EightBit,
    Mixed,
)
from diffusion_engines.errors import BuildError, ConfigError, ExportError
from diffusion_engines.families.base import Dtype, TensorSpec, outputs_of
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.graph import MODEL, check_graph, opset_of
from diffusion_engines.onnx.quantize import (
    check_quantized,
    kept_nodes,
    lower_precision,
    mix_precision,
    quantize_graph,
    typed_inputs,
)
from diffusion_engines.onnx.simplify import simplify_graph
from diffusion_engines.parity.distances import Difference
from diffusion_engines.parity.graphs import compare_graphs
from diffusion_engines.parity.results import GraphParity
from diffusion_engines.runtime.calls import spread
from diffusion_engines.runtime.networks import example_inputs
from tests.conftest import COMPONENTS, Loaded, graph_of, load
from tests.manifests import built_manifest, graph_manifest
from tests.tiers import long, long_but

RTX = TensorRTRTXTarget(
    "tensorrt_rtx", ["8.9"], TensorRTRTXBuild(None, "none", "layer_names_only", tf32=False)
)
CPU = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild("all", tf32=False))
KEPT: Any = {
    "text_encoder": [],
    "unet": [r"\.conv_in\.", r"\.conv_out\.", r"\.time_embedding\.", r"\.time_emb_proj\."],
    "vae_decoder": [r"\.conv_in\.", r"\.conv_out\."],
}
EIGHT_BIT = EightBit(source="fp16", calls=2, method="max", kept=KEPT, rel_l2=0.2)
SETTINGS: dict[str, Any] = {
    "int8": EIGHT_BIT,
    "fp8": EIGHT_BIT,
    "fp16-mixed": Mixed(source="fp32", calls=2, largest=512.0, kept={}, rel_l2=0.01),
}
# Relative L2 to fp32 PyTorch on random inputs, weights random: about twice of what the VAE decoder,
# which loses most, was measured at.
ALLOWED = {"fp32": 1e-5, "fp16": 3e-3, "fp16-mixed": 3e-3, "int8": 0.4, "fp8": 0.5}
SOURCE: dict[str, Any] = {"int8": "fp16", "fp8": "fp16", "fp16-mixed": "fp32"}
EVERY = ("fp32", "fp16", "bf16", *("fp16-mixed", "int8", "fp8"))
# The UNet, whose graphs take longest, is quantized in tests/pipeline/test_quantize.py as well.
QUICK = [*product(["vae_decoder"], SOURCE), ("text_encoder", "int8")]


class Graphs:
    """Simplified exports of the tiny model, made when they are asked for."""

    def __init__(self, weights: Path, root: Path) -> None:
        self.weights, self.root = weights, root

    def loaded(self, name: str, precision: str = "fp32") -> Loaded:
        return load(self.weights, name, precision)

    def calls(self, name: str, count: int = 2) -> list[tuple[tuple[torch.Tensor, ...], Any]]:
        loaded = self.loaded(name)
        calls = []
        for seed in range(count):
            inputs = example_inputs(loaded.inputs, "fp32", vocabulary=loaded.vocabulary, seed=seed)
            with torch.no_grad():
                calls.append((inputs, outputs_of(loaded.module(*inputs))))
        return calls

    def source(self, name: str, precision: str, opset: int = 22) -> Path:
        folder = self.root / f"{name}-{precision}-{opset}"
        if not folder.exists():
            loaded = self.loaded(name, precision)
            raw = self.root / f"raw-{folder.name}"
            raw.mkdir()
            export_module(
                loaded.module,
                loaded.inputs,
                raw,
                precision=precision,
                exporter="dynamo",
                opset=opset,
                patches=[],
                vocabulary=loaded.vocabulary,
            )
            folder.mkdir()
            simplify_graph(raw / MODEL, folder, skipped_optimizers=[])
        return folder

    def lowered(self, name: Any, precision: Any, opset: int = 22) -> Path:
        folder = self.root / f"{name}-{precision}-{opset}"
        if not folder.exists():
            source = self.source(name, SOURCE[precision], opset)
            folder.mkdir()
            lower_precision(
                source,
                folder,
                [inputs for inputs, _ in self.calls(name)],
                name,
                precision,
                SETTINGS[precision],
                self.root / "logs" / folder.name,
            )
        return folder


@pytest.fixture(scope="module")
def graphs(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(tiny_weights, tmp_path_factory.mktemp("graphs"))


def types_of(path: Path) -> list[int]:
    graph = onnx.load(path, load_external_data=False).graph
    return [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]


@pytest.mark.parametrize(("name", "precision"), long_but(QUICK, product(COMPONENTS, SOURCE)))
def test_a_lower_precision_computes_nearly_the_same(
    graphs: Graphs, name: str, precision: str
) -> None:
    source, lowered = graphs.source(name, SOURCE[precision]), graphs.lowered(name, precision)
    check_graph(lowered / MODEL, opset=22, writer="ModelOpt")
    assert types_of(lowered / MODEL) == types_of(source / MODEL)
    assert sorted(file.name for file in lowered.iterdir()) == [MODEL, "model.onnx.data"]
    parity = compare_graphs(
        source / MODEL, lowered / MODEL, graphs.calls(name), names=("source", precision)
    )
    worst = parity.worst()
    assert worst["source_rel_l2"] < ALLOWED[SOURCE[precision]]
    # At least the source's error: a graph that is as exact as its source was not changed at all.
    assert worst["source_rel_l2"] < worst["rel_l2"] < ALLOWED[precision]
    assert worst["not_finite"] == 0


@pytest.mark.parametrize(
    ("name", "precision"),
    long_but(
        [*product(["vae_decoder"], EVERY), ("text_encoder", "int8")], product(COMPONENTS, EVERY)
    ),
)
def test_tensorrt_rtx_builds_every_component_in_every_precision(
    graphs: Graphs, tmp_path: Path, name: str, precision: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    make = graphs.lowered if precision in SOURCE else graphs.source
    path = make(name, precision) / MODEL
    result = backend("tensorrt_rtx").build(
        graph_of(path, graphs.loaded(name).inputs, precision), tmp_path, RTX
    )
    assert (tmp_path / result.engine).stat().st_size > 100_000
    assert result.precisions["fp16" if precision == "fp16-mixed" else precision] > 10


def test_an_engine_without_the_quantized_precision_is_refused(
    graphs: Graphs, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    path = graphs.source("text_encoder", "fp16") / MODEL
    with pytest.raises(BuildError, match="some int8"):
        backend("tensorrt_rtx").build(graph_of(path, [], "int8"), tmp_path, RTX)


@pytest.mark.parametrize("precision", SOURCE)
def test_onnxruntime_builds_and_runs_it(graphs: Graphs, tmp_path: Path, precision: str) -> None:
    module = backend("onnxruntime")
    path = graphs.lowered("vae_decoder", precision) / MODEL
    result = module.build(graph_of(path, [], precision), tmp_path, CPU)
    made = graph_manifest("vae_decoder", precision)
    engine = module.load(tmp_path, built_manifest("cpu-vae_decoder", made, CPU, result), "cpu")
    ((inputs, (expected,)), *_) = graphs.calls("vae_decoder")
    error = (engine(*inputs).float() - expected).norm() / expected.norm()
    assert error < ALLOWED[precision]


@pytest.mark.parametrize("opset", long_but([18, 22], [18, 20, 22]))
def test_activations_are_quantized_at_every_opset(graphs: Graphs, opset: int) -> None:
    # GroupNormalization exists from opset 21 on; left alone, ModelOpt loses the types behind it.
    lowered = graphs.lowered("vae_decoder", "int8", opset)
    model = onnx.load(lowered / MODEL, load_external_data=False)
    assert opset_of(model) == max(opset, 19)  # the first whose Q and DQ have scales in fp16
    found = check_quantized(model, kept_nodes(model, [r"\.conv_in\."]), "vae_decoder")
    # conv_in and conv_out are kept; post_quant_conv has too few channels for ModelOpt.
    assert found.lowered["Conv"] == 24
    assert found.kept["Conv"] == 3


@pytest.mark.parametrize("name", long_but(["vae_decoder"], ["unet", "vae_decoder"]))
def test_entropy_calibration_takes_fp16(graphs: Graphs, tmp_path: Path, name: str) -> None:
    # ONNX Runtime asked for more bins than fp16 has numbers.
    source = graphs.source(name, "fp16")
    quantize_graph(
        source,
        tmp_path,
        [inputs for inputs, _ in graphs.calls(name)],
        precision="int8",
        source_precision="fp16",
        method="entropy",
        kept=[],
        log=tmp_path / "logs" / "modelopt.log",
    )
    parity = compare_graphs(
        source / MODEL, tmp_path / MODEL, graphs.calls(name), names=("source", "int8")
    )
    assert parity.worst()["rel_l2"] < 2 * ALLOWED["int8"]


@long
def test_what_is_kept_is_neither_more_nor_less(graphs: Graphs, tmp_path: Path) -> None:
    # ModelOpt takes names as patterns: "node_conv2d" would keep "node_conv2d_1" and all others.
    source = graphs.source("unet", "fp16")
    model = onnx.load(source / MODEL, load_external_data=False)
    names = kept_nodes(model, [r"^network\.conv_in\."])
    assert len(names) == 1
    assert sum(node.name.startswith(names[0]) for node in model.graph.node) > 40
    found = quantize_graph(
        source,
        tmp_path,
        [inputs for inputs, _ in graphs.calls("unet", 1)],
        precision="fp8",
        source_precision="fp16",
        method="max",
        kept=[r"^network\.conv_in\."],
        log=tmp_path / "modelopt.log",
    )
    assert found.lowered["Conv"] > 40
    assert "Starting FP8 quantization" in (tmp_path / "modelopt.log").read_text()


def test_a_pattern_that_keeps_nothing_is_refused(graphs: Graphs) -> None:
    model = onnx.load(graphs.source("vae_decoder", "fp16") / MODEL, load_external_data=False)
    with pytest.raises(ConfigError, match="no weight of this graph matches") as raised:
        kept_nodes(model, [r"\.conv_out\.", r"\.conv_oops\."])
    assert "conv_oops" in str(raised.value)
    assert "decoder.conv_out.weight" in str(raised.value)


def test_two_runs_write_equal_graphs(graphs: Graphs, tmp_path: Path) -> None:
    for index in range(2):
        folder = tmp_path / str(index)
        folder.mkdir()
        lower_precision(
            graphs.source("text_encoder", "fp16"),
            folder,
            [inputs for inputs, _ in graphs.calls("text_encoder")],
            "text_encoder",
            "int8",
            EIGHT_BIT,
            tmp_path / "logs",
        )
    for file in (MODEL, "model.onnx.data"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()


def qdq_graph(*, activation: bool = True, weight: bool = True) -> onnx.ModelProto:
    """A MatMul whose activation and weight are in 8 bits, or not."""
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
    left = numpy_helper.from_array(np.ones((4, 4), np.int8 if weight else np.float32), "weight")
    nodes = [helper.make_node("MatMul", ["a" if activation else "input_0", "w"], ["output_0"], "m")]
    if activation:
        nodes.insert(0, helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"]))
        nodes.insert(0, helper.make_node("QuantizeLinear", ["input_0", "scale", "zero"], ["q"]))
    how = ["weight", "scale", "zero"] if weight else ["weight"]
    nodes.insert(0, helper.make_node("DequantizeLinear" if weight else "Identity", how, ["w"]))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in ("input_0",)]
    outputs = [helper.make_tensor_value_info("output_0", TensorProto.FLOAT, [4, 4])]
    graph = helper.make_graph(nodes, "g", values, outputs, [scale, zero, left])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_what_is_quantized_is_checked_against_what_was_asked_for() -> None:
    found = check_quantized(qdq_graph(), [], "g")
    assert (found.lowered, found.kept) == ({"MatMul": 1}, {})
    with pytest.raises(ExportError, match="m: a weight in 8 bits, its activation not"):
        check_quantized(qdq_graph(activation=False), [], "g")
    with pytest.raises(ExportError, match="no quantized layer"):
        check_quantized(qdq_graph(weight=False), [], "g")
    with pytest.raises(ExportError, match="m: quantized, though"):
        check_quantized(qdq_graph(), ["m"], "g")


def overflowing_graph(folder: Path) -> Path:
    """A graph whose intermediate values reach about 1e6, then are normalized: fp32 only."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        "large.weight": rng.standard_normal((16, 16, 3, 3)) * 1e4,
        "one": np.ones(16),
        "zero": np.zeros(16),
        "small.weight": rng.standard_normal((16, 16, 3, 3)),
    }
    nodes = [
        helper.make_node("Conv", ["input_0", "large.weight"], ["a"], "large", pads=[1, 1, 1, 1]),
        helper.make_node("InstanceNormalization", ["a", "one", "zero"], ["b"], "norm"),
        helper.make_node("Conv", ["b", "small.weight"], ["output_0"], "small", pads=[1, 1, 1, 1]),
    ]
    shape = [1, 16, 8, 8]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output_0", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, folder / MODEL)
    return folder


def test_mixed_precision_survives_where_fp16_overflows(tmp_path: Path) -> None:
    source = overflowing_graph(tmp_path / "source")
    inputs = (torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(0)),)
    expected = evaluate(source, inputs)
    found = {}
    for name, largest in (("mixed", 512.0), ("all in fp16", 1e12)):
        folder = tmp_path / name
        folder.mkdir()
        mix_precision(source, folder, [inputs], largest=largest, kept=[], log=tmp_path / "log")
        found[name] = evaluate(folder, inputs)
    error = np.linalg.norm(found["mixed"] - expected) / np.linalg.norm(expected)
    assert 0 < error < 5e-3
    assert not np.isfinite(found["all in fp16"]).all()


def evaluate(folder: Path, inputs: tuple[torch.Tensor, ...]) -> np.ndarray:
    """Compute in the precision that is written: ONNX Runtime's CPU computes fp16 in fp32."""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(all="ignore"):
        evaluator: Any = ReferenceEvaluator(str(folder / MODEL))
        return evaluator.run(None, {"input_0": inputs[0].numpy()})[0]


def test_operators_that_are_kept_stay_in_fp32(graphs: Graphs, tmp_path: Path) -> None:
    source = graphs.source("vae_decoder", "fp32")
    calls = [inputs for inputs, _ in graphs.calls("vae_decoder", 1)]
    counts = {}
    for kept in ((), (r"\.up_blocks\.0\.",)):
        folder = tmp_path / str(len(kept))
        folder.mkdir()
        counts[kept] = mix_precision(
            source, folder, calls, largest=512.0, kept=kept, log=tmp_path / "log"
        )
    assert counts[()].kept == {}
    assert counts[(r"\.up_blocks\.0\.",)].kept["Conv"] > 3


def test_what_modelopt_cannot_do_is_an_error_with_its_log(tmp_path: Path) -> None:
    source = overflowing_graph(tmp_path / "source")
    wrong = (torch.zeros(1, 3, 8, 8),)  # 3 channels instead of 16
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="ModelOpt could not quantize source") as raised:
        quantize_graph(
            source,
            tmp_path / "out",
            [wrong],
            precision="int8",
            source_precision="fp32",
            method="max",
            kept=[],
            log=tmp_path / "logs" / "modelopt.log",
        )
    assert str(tmp_path / "logs" / "modelopt.log") in str(raised.value)
    assert not list((tmp_path / "out").iterdir())


def test_calls_are_spread_over_the_whole_trajectory() -> None:
    calls = list(range(40))
    assert spread(calls, None) == calls
    assert spread(calls, 100) == calls
    chosen = spread(calls, 5)
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 39, 5)
    assert spread(calls, 1) == [0]


def test_inputs_get_the_dtype_of_the_source() -> None:
    dtypes: tuple[Dtype, ...] = ("component", "float32", "int64")
    inputs = [TensorSpec("input_0", "latents", dtype, (1,)) for dtype in dtypes]
    found = [value.dtype for value in typed_inputs(inputs, "fp16")]
    assert found == ["float16", "float32", "int64"]


def test_a_quantized_graph_out_of_tolerance_is_described_call_by_call() -> None:
    good, far = Difference(0.1, 1.0, 1.0, 0), Difference(0.3, 1.0, 0.9, 0)
    broken = Difference(float("inf"), float("inf"), 0.0, 7)
    parity = GraphParity((good, good, good), (good, far, broken))
    assert parity.misses(0.2) == [
        "call 1: rel_l2 3.00e-01 > 2.00e-01",
        "call 2: 7 values are NaN or infinite",
    ]
    assert parity.worst()["not_finite"] == 7
    assert [row["source_rel_l2"] for row in parity.rows()] == [0.1, 0.1, 0.1]


def test_without_modelopt_the_command_that_installs_it_is_named() -> None:
    code = (
        "import sys, importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'modelopt' else found(n, *a)\n"
        "from diffusion_engines.onnx import quantize\n"
        "assert 'modelopt' not in sys.modules\n"
        "from diffusion_engines.errors import HardwareError\n"
        "try:\n"
        "    quantize._require_modelopt()\n"
        "except HardwareError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the library modelopt is not installed" in done.stderr
    assert "'.[quantize]'" in done.stderr
