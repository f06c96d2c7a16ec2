"""From modules to graphs: patches, exporters, checks, simplification, operator counts."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional

from diffusion_engines.config import Dynamic
from diffusion_engines.errors import ConfigError, ExportError
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.graph import check_graph, opset_of
from diffusion_engines.onnx.operators import graph_statistics, render
from diffusion_engines.onnx.patches import applied
from diffusion_engines.onnx.simplify import check_same_results, simplify_graph
from diffusion_engines.onnx.statistics import Simplification
from diffusion_engines.runtime.networks import example_inputs
from tests.conftest import COMPONENTS, Exports, Loaded, load
from tests.tiers import long, long_but

PATCHES = ["explicit_attention"]
OPEN = Dynamic(batch_size=[1, 4], height=[64, 768], width=[64, 768])


def export(loaded: Loaded, folder: Path, precision: str = "fp32", **settings) -> Path:
    folder.mkdir()
    export_module(
        loaded.module,
        loaded.inputs,
        folder,
        precision=precision,
        exporter=settings.get("exporter", "dynamo"),
        opset=settings.get("opset", 18),
        patches=settings.get("patches", []),
        vocabulary=loaded.vocabulary,
    )
    return folder / "model.onnx"


def error_in_onnxruntime(path: Path, loaded: Loaded, inputs: tuple[torch.Tensor, ...]) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {f"input_{i}": tensor.numpy() for i, tensor in enumerate(inputs)}
    with torch.no_grad():
        expected = loaded.module(*inputs).numpy()
    found = session.run(None, feeds)[0]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize(
    ("exporter", "opset", "patches"),
    [
        pytest.param("dynamo", 17, (), marks=long),
        ("dynamo", 18, ()),
        pytest.param("dynamo", 20, (), marks=long),
        pytest.param("torchscript", 17, (), marks=long),
        ("torchscript", 12, tuple(PATCHES)),
    ],
)
def test_an_export_computes_what_pytorch_does(
    exports: Exports, name: str, exporter: str, opset: int, patches: tuple[str, ...]
) -> None:
    loaded, path = exports(name, "fp32", exporter, opset, patches)

    model = onnx.load(path, load_external_data=False)
    assert opset_of(model) == opset
    count = len(loaded.inputs)
    assert [i.name for i in model.graph.input] == [f"input_{i}" for i in range(count)]
    assert [o.name for o in model.graph.output] == ["output_0"]
    assert path.with_name("model.onnx.data").stat().st_size > path.stat().st_size / 10
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    inputs = example_inputs(loaded.inputs, "fp32", vocabulary=loaded.vocabulary, seed=1)
    assert error_in_onnxruntime(path, loaded, inputs) < 1e-4


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_opset_12_needs_the_attention_patch(tiny_weights: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="scaled_dot_product_attention") as raised:
        export(load(tiny_weights, name), tmp_path / "x", exporter="torchscript", opset=12)
    assert "export.patches=[explicit_attention]" in str(raised.value)


@pytest.mark.parametrize("opset", long_but([14], [12, 13, 14]))
def test_an_opset_that_dynamo_answers_with_another_fails(
    tiny_weights: Path, tmp_path: Path, opset: int
) -> None:
    with pytest.raises(ExportError) as raised:
        export(load(tiny_weights, "vae_decoder"), tmp_path / "x", opset=opset)
    assert "export.opset" in str(raised.value)
    assert f"expected: {opset}" in str(raised.value)
    assert "found:    18" in str(raised.value)


def test_an_invalid_graph_fails(tiny_weights: Path, tmp_path: Path) -> None:
    # The TorchScript exporter mixes float and float16 in LayerNormalization, and exits 0.
    loaded = load(tiny_weights, "text_encoder", "fp16")
    with pytest.raises(ExportError, match="invalid graph") as raised:
        export(loaded, tmp_path / "x", "fp16", exporter="torchscript", opset=17)
    assert "export.exporter=dynamo" in str(raised.value)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_two_exports_are_equal_byte_for_byte(
    tiny_weights: Path, tmp_path: Path, exporter: str
) -> None:
    paths = [
        export(load(tiny_weights, "vae_decoder"), tmp_path / str(i), exporter=exporter, opset=18)
        for i in range(2)
    ]
    for file in ("model.onnx", "model.onnx.data"):
        assert paths[0].with_name(file).read_bytes() == paths[1].with_name(file).read_bytes()


@pytest.mark.parametrize(
    ("name", "exporter"),
    long_but(
        [("vae_decoder", "dynamo"), ("text_encoder", "dynamo"), ("unet", "torchscript")],
        product(COMPONENTS, ["dynamo", "torchscript"]),
    ),
)
def test_open_dimensions_take_other_sizes(
    tiny_weights: Path, tmp_path: Path, name: str, exporter: str
) -> None:
    loaded = load(tiny_weights, name, dynamic=OPEN)
    path = export(loaded, tmp_path / "x", exporter=exporter, opset=18)
    for batch, height, width in ((1, 8, 16), (3, 24, 12)):
        sizes: dict[str, list[tuple[int, ...]]] = {
            "text_encoder": [(batch, 77)],
            "unet": [(2 * batch, 4, height, width), (1,), (2 * batch, 77, 32)],
            "vae_decoder": [(batch, 4, height, width)],
        }
        generator = torch.Generator().manual_seed(batch)
        inputs = tuple(
            torch.randint(514, shape, generator=generator)
            if name == "text_encoder"
            else torch.full(shape, 7.0)
            if shape == (1,)
            else torch.randn(shape, generator=generator)
            for shape in sizes[name]
        )
        assert error_in_onnxruntime(path, loaded, inputs) < 1e-4


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_explicit_attention_is_attention(mask: str | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    options: dict = {"scale": 0.3}
    if mask == "bool":
        options["attn_mask"] = torch.rand(5, 7) > 0.3
    if mask == "float":
        options["attn_mask"] = torch.randn(5, 7)
    if mask == "causal":
        options = {"is_causal": True}
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    original = functional.scaled_dot_product_attention
    with applied(PATCHES):
        assert functional.scaled_dot_product_attention is not original
        found = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected)


def test_patches_are_undone_after_a_failure() -> None:
    originals = functional.scaled_dot_product_attention, torch.broadcast_to

    def fail() -> None:
        with applied(["explicit_attention", "expand_for_broadcast_to"]):
            assert torch.broadcast_to is not originals[1]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (functional.scaled_dot_product_attention, torch.broadcast_to) == originals


def test_expand_is_broadcast_to() -> None:
    tensor = torch.arange(3.0)[:, None]
    expected = torch.broadcast_to(tensor, (2, 3, 4))
    with applied(["expand_for_broadcast_to"]):
        assert torch.equal(torch.broadcast_to(tensor, (2, 3, 4)), expected)
        assert torch.equal(tensor.broadcast_to(2, 3, 4), expected)
        assert torch.equal(tensor.broadcast_to((2, 3, 4)), expected)


def test_an_unknown_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such patch: nope"), applied(["nope"]):
        pass


def matmul_graph(path: Path, scale: float = 1.0) -> Path:
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {
        "kernel": rng.standard_normal((4, 3, 3, 3)) * scale,
        "right": rng.standard_normal((6, 5)),
        "gemm": rng.standard_normal((5, 2)),
    }
    nodes = [
        helper.make_node("Conv", ["input_0", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["c", "right"], ["m"]),
        helper.make_node("Reshape", ["m", "shape"], ["r"]),
        helper.make_node("Gemm", ["r", "gemm"], ["g"]),
        helper.make_node("Identity", ["g"], ["output_0"]),
    ]
    initializers = [
        onnx.numpy_helper.from_array(value.astype(np.float32), name)
        for name, value in tensors.items()
    ]
    initializers.append(onnx.numpy_helper.from_array(np.array([24, 5]), "shape"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_0", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("output_0", TensorProto.FLOAT, [24, 2])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_macs_are_those_computed_by_hand(tmp_path: Path) -> None:
    statistics = graph_statistics(matmul_graph(tmp_path / "g" / "model.onnx"))
    conv, matmul, gemm = 4 * 6 * 6 * 27, 4 * 6 * 5 * 6, 24 * 2 * 5
    assert statistics.macs == conv + matmul + gemm
    assert statistics.nodes == 5
    assert not list((tmp_path / "g").glob(".inferred*"))


def test_simplification_keeps_results_and_is_counted(tmp_path: Path) -> None:
    before = matmul_graph(tmp_path / "g" / "model.onnx")
    (tmp_path / "s").mkdir()
    simplify_graph(before, tmp_path / "s", skipped_optimizers=[])
    after = tmp_path / "s" / "model.onnx"
    check_graph(after, opset=18, writer="onnxsim")
    error = check_same_results(before, after, seed=0, allowed=1e-5)
    assert error is not None
    assert error < 1e-5
    table = render(Simplification(graph_statistics(before), graph_statistics(after)), "g")
    assert "Identity" in table
    assert graph_statistics(after).operators.get("Identity", 0) == 0


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    before = matmul_graph(tmp_path / "a" / "model.onnx")
    after = matmul_graph(tmp_path / "b" / "model.onnx", scale=1.05)
    with pytest.raises(ExportError, match="changed what a computes"):
        check_same_results(before, after, seed=0, allowed=1e-3)


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    (tmp_path / "s").mkdir()
    with pytest.raises(ExportError, match="onnxsim could not simplify"):
        simplify_graph(tmp_path / "model.onnx", tmp_path / "s", skipped_optimizers=[])
