"""Plans without weights: what they are built from, and how they get those of their bundle.

The refit itself is a double's (tests/doubles/tensorrt.py): it takes a GPU, and so do builds of
TensorRT-RTX that can be refitted.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffusion_engines import manifests
from diffusion_engines.backends import backend, gpus
from diffusion_engines.backends.nvidia.building import ENGINE, parse_graph, recording_logger
from diffusion_engines.backends.nvidia.building.stand_in import buildable, weights_of
from diffusion_engines.backends.tensorrt import running
from diffusion_engines.backends.tensorrt_rtx.fingerprint import fingerprint_of
from diffusion_engines.backends.tensorrt_rtx.settings import TensorRTRTXBuild, TensorRTRTXTarget
from diffusion_engines.errors import BuildError, HardwareError, IntegrityError
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.simplify import simplify_graph
from diffusion_engines.onnx.structure import save_with_weights_apart
from diffusion_engines.runtime.bundle import wrap_engine
from tests.conftest import Exports, graph_of, load
from tests.doubles.tensorrt import WIDTH, Engine, Refitter, install_streams, module_of
from tests.manifests import engine_manifest, graph_manifest, weights_manifest
from tests.unit.backends.test_tensorrt import TARGET

STRIPPED = replace(TARGET, build=replace(TARGET.build, weights="stripped"))


def write_graph(folder: Path, scale: float, *, name: str = "scale", epsilon: float = 1e-5) -> Path:
    """A graph with a weight, and with constants that are none, as `simplify` writes it."""
    folder.mkdir(parents=True)
    constants = {
        name: np.linspace(scale, scale + 1, WIDTH, dtype=np.float32),
        "epsilon": np.array(epsilon, np.float32),
        "ones": np.ones(WIDTH, np.float32),
        "half": np.array([0.5, 0.25], np.float32),
        "shape": np.array([-1, WIDTH]),
    }
    nodes = [
        helper.make_node("Mul", ["input_0", name], ["scaled"]),
        helper.make_node("Add", ["scaled", "epsilon"], ["moved"]),
        helper.make_node("Mul", ["moved", "ones"], ["same"]),
        # A size that is computed: its floats shape the graph.
        helper.make_node("Shape", ["same"], ["size"]),
        helper.make_node("Cast", ["size"], ["sizes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sizes", "half"], ["smaller"]),
        helper.make_node("Cast", ["smaller"], ["whole"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["whole"], ["unused"]),
        helper.make_node("Reshape", ["same", "shape"], ["output_0"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [value("input_0", TensorProto.FLOAT, ["batch", WIDTH])],
        [value("output_0", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(array, key) for key, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    save_with_weights_apart(model, folder / "model.onnx")
    origin = weights_manifest(model=folder.name)
    manifests.write(folder, graph_manifest("unet", "fp32", weights=origin))
    return folder


def bundle_of(graph: Path, built: Path, folder: Path) -> Path:
    """The bundle of a plan of one graph's structure, with the weights of another graph."""
    structure, engine = folder / "structure", folder / "engine"
    structure.mkdir(parents=True)
    (structure / "model.onnx").write_bytes((built / "model.onnx").read_bytes())
    made = manifests.structure_of_graph(manifests.read(built, manifests.Graph))
    manifests.write(structure, made)
    engine.mkdir()
    (engine / ENGINE).write_bytes(b"a plan")
    manifests.write(
        engine,
        engine_manifest(
            "a10-unet",
            manifests.read(structure, manifests.Structure),
            backend="tensorrt",
            engine=ENGINE,
            settings=asdict(STRIPPED),
        ),
    )
    bundle = folder / "bundle"
    bundle.mkdir()
    wrap_engine(engine, bundle, graph=graph)
    return bundle


def test_a_weight_is_what_training_changes(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "a", 3.0)
    assert [tensor.name for tensor in weights_of(graph / "model.onnx")] == ["scale"]
    other = write_graph(tmp_path / "b", 7.0)
    assert (graph / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()
    assert (graph / "model.onnx.data").read_bytes() != (other / "model.onnx.data").read_bytes()
    # What an operator computes with is no weight: with another one it is another network.
    moved = write_graph(tmp_path / "c", 3.0, epsilon=1e-3)
    assert (graph / "model.onnx").read_bytes() != (moved / "model.onnx").read_bytes()
    loaded = onnx.load(graph / "model.onnx")
    onnx.checker.check_model(loaded)
    (scale,) = [t for t in loaded.graph.initializer if t.name == "scale"]
    assert numpy_helper.to_array(scale).tolist() == pytest.approx([3, 3 + 1 / 3, 3 + 2 / 3, 4])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a bundle with a plan without weights, and call it."""

    def call(bundle: Path, **weights: None) -> torch.Tensor:
        engine = Engine(weights=weights or {"scale": None})
        install_streams(engine, monkeypatch)
        monkeypatch.setattr(running, "library", lambda: module_of(engine))
        module = running.load(bundle, manifests.read(bundle, manifests.Bundle), "cpu")
        return module(torch.arange(2.0 * WIDTH).reshape(2, WIDTH))

    return call


def test_two_fine_tunes_share_a_plan_and_keep_their_numbers(tmp_path: Path, run: Any) -> None:
    first = write_graph(tmp_path / "first", 3.0)
    graphs = {"first": first, "second": write_graph(tmp_path / "second", 7.0)}
    bundles = {n: bundle_of(graph, first, tmp_path / f"of-{n}") for n, graph in graphs.items()}
    plans = [manifests.read(b, manifests.Bundle).files[ENGINE] for b in bundles.values()]
    assert plans[0] == plans[1]
    # Each says whose weights it has, though none of them was there when the plan was built.
    assert [manifests.read(b, manifests.Bundle).model for b in bundles.values()] == [*graphs]
    before, other, after = (run(bundles[name]) for name in ("first", "second", "first"))
    assert torch.equal(before, after)
    torch.testing.assert_close(other[1] - before[1], 4.0 * torch.arange(4.0, 8.0))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"scale": None, "bias": None}, "no weights for bias"),
        ({"bias": None}, "the plan has no place for scale"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, run: Any, plan: dict[str, None], expected: str
) -> None:
    graph = write_graph(tmp_path / "graph", 3.0)
    with pytest.raises(BuildError, match="could not be given its weights") as raised:
        run(bundle_of(graph, graph, tmp_path / "of"), **plan)
    assert f"found:    {expected}" in str(raised.value)
    assert "build.weights=embedded" in str(raised.value)


def test_a_bundle_of_an_earlier_version_has_no_weights_to_give(tmp_path: Path, run: Any) -> None:
    graph = write_graph(tmp_path / "graph", 3.0)
    bundle = bundle_of(graph, graph, tmp_path / "of")
    for name in ("model.onnx", "model.onnx.data"):
        (bundle / name).unlink()
    manifests.write(bundle, manifests.read(bundle, manifests.Bundle, verify=False))
    with pytest.raises(IntegrityError, match="has no weights, and neither has its bundle"):
        run(bundle)


def test_a_refit_that_fails_is_no_engine(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = write_graph(tmp_path / "graph", 3.0)
    monkeypatch.setattr(Refitter, "ok", False)
    with pytest.raises(BuildError, match="could not be given its weights"):
        run(bundle_of(graph, graph, tmp_path / "of"))


def test_weights_of_another_structure_are_refused(tmp_path: Path) -> None:
    """TensorRT goes by names alone, and would take them."""
    built = write_graph(tmp_path / "built", 3.0)
    other = write_graph(tmp_path / "other", 3.0, epsilon=1e-3)
    with pytest.raises(BuildError, match="do not fit the engine a10-unet"):
        bundle_of(other, built, tmp_path / "of")


@pytest.fixture(scope="module")
def fine_tunes(
    exports: Exports, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The graphs of two fine-tunes of a network, as `export` and `simplify` write them."""
    folder = tmp_path_factory.mktemp("fine-tunes")
    _, first = exports("vae_decoder", "fp16")
    tuned = load(tiny_weights, "vae_decoder", "fp16")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.module.parameters():
            # The norms of random weights are ones and zeros; training has moved those of both.
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 100)
    (folder / "exported").mkdir()
    export_module(
        tuned.module,
        tuned.inputs,
        folder / "exported",
        precision="fp16",
        exporter="dynamo",
        opset=18,
        patches=[],
    )
    graphs = []
    for index, source in enumerate((first, folder / "exported" / "model.onnx")):
        (folder / str(index)).mkdir()
        simplify_graph(source, folder / str(index), skipped_optimizers=[])
        graphs.append(folder / str(index) / "model.onnx")
    return graphs


def test_fine_tunes_have_one_structure_and_one_stand_in(
    fine_tunes: list[Path], tmp_path: Path
) -> None:
    first, second = (path.read_bytes() for path in fine_tunes)
    assert first == second
    data = [path.with_name("model.onnx.data").read_bytes() for path in fine_tunes]
    assert data[0] != data[1]
    # Where `build` reads it, a structure lies without weights.
    alone = tmp_path / "structure" / "model.onnx"
    alone.parent.mkdir()
    alone.write_bytes(first)
    found = []
    for path in (*fine_tunes, alone):
        with buildable(graph_of(path, [], "fp16"), tmp_path, "stripped") as filled:
            assert filled.path.read_bytes() == first
            found.append(filled.path.with_name("model.onnx.data").read_bytes())
            tensors = onnx.load(filled.path).graph.initializer
        assert not filled.path.parent.exists()
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(data[0])
    named = {tensor.name for tensor in weights_of(alone)}
    values = [numpy_helper.to_array(tensor) for tensor in tensors if tensor.name in named]
    assert all(0 < np.abs(value.astype(np.float32)).max() < 0.2 for value in values)
    with buildable(graph_of(fine_tunes[0], [], "fp16"), tmp_path, "refittable") as same:
        assert same.path == fine_tunes[0]


def test_tensorrt_rtx_knows_the_weights_by_their_names(
    fine_tunes: list[Path], tmp_path: Path
) -> None:
    """Its parser is TensorRT's; what it calls a weight is what a refit gives it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    logger = recording_logger(trt)
    with buildable(graph_of(fine_tunes[0], [], "fp16"), tmp_path, "stripped") as filled:
        _, network = parse_graph(trt, "TensorRT-RTX", filled.path, logger, flags)
        names = [tensor.name for tensor in weights_of(fine_tunes[0])]
        assert len(names) > 50
        assert [name for name in names if not network.mark_weights_refittable(name)] == []
        assert not network.mark_weights_refittable("no such weight")


def test_tensorrt_rtx_builds_for_refits_only_beside_a_driver(
    fine_tunes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    build = TensorRTRTXBuild(None, "none", "layer_names_only", tf32=False, weights="stripped")
    target = TensorRTRTXTarget("tensorrt_rtx", ["8.9"], build)
    monkeypatch.setattr(gpus, "find_gpu", lambda: None)
    with pytest.raises(HardwareError, match="only where an NVIDIA driver is"):
        fingerprint_of(target)
    if not torch.cuda.is_available():
        # The library's own words, without which there would be nothing to refuse.
        graph = graph_of(fine_tunes[0], [], "fp16", "vae_decoder")
        with pytest.raises(BuildError, match="CUDA driver version is insufficient"):
            backend("tensorrt_rtx").build(graph, tmp_path, target)
    embedded = replace(target, build=replace(build, weights="embedded"))
    assert fingerprint_of(embedded)["compute_capabilities"] == ["8.9"]
