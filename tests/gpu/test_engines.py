"""Engines on a GPU that they support: `make test-gpu`.

A test skips where its library, its program or a fitting GPU is missing, and says which.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import platformdirs
import pytest
import torch

from diffusion_engines import manifests
from diffusion_engines.backends import backend
from diffusion_engines.backends.nvidia.settings import Wrap
from diffusion_engines.backends.nvidia.wrapping.distribution import (
    DISTRIBUTIONS,
    wrap_fingerprint,
)
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from diffusion_engines.backends.tensorrt.settings import TensorRTBuild, TensorRTTarget
from diffusion_engines.backends.tensorrt_rtx.settings import (
    RTX_CAPABILITIES,
    TensorRTRTXBuild,
    TensorRTRTXTarget,
)
from diffusion_engines.doctor import toy
from diffusion_engines.errors import FingerprintError, HardwareError
from diffusion_engines.files import write_json
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.structure import save_with_weights_apart
from diffusion_engines.parity.metrics import difference
from diffusion_engines.runtime.assemble import torch_networks
from diffusion_engines.runtime.bundle import (
    load_bundle,
    load_exported_program,
    load_torchscript,
    wrap_engine,
)
from diffusion_engines.runtime.networks import example_inputs
from tests.conftest import graph_of, load
from tests.manifests import built_manifest, graph_manifest

pytestmark = pytest.mark.gpu

BACKENDS = ("tensorrt", "tensorrt_rtx")
BUILD = TensorRTBuild(
    optimization_level=2,
    workspace_mib=None,
    timing_cache=True,
    max_aux_streams=None,
    profiling_verbosity="detailed",
    tf32=False,
    version_compatible=False,
    exclude_lean_runtime=False,
    hardware_compatibility="none",
    weights="embedded",
)


def target_here(name: str, wrap: Sequence[Wrap] = ()) -> Any:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    if name == "onnxruntime":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime is not onnxruntime-gpu")
        return OnnxRuntimeTarget("onnxruntime", "cuda", OnnxRuntimeBuild("all", tf32=False))
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "tensorrt":
        gpu = torch.cuda.get_device_name()
        return TensorRTTarget("tensorrt", gpu, capability, [*wrap], BUILD)
    if capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not run on {capability}")
    settings = TensorRTRTXBuild(None, "none", "layer_names_only", tf32=False)
    return TensorRTRTXTarget("tensorrt_rtx", [capability], settings, [*wrap])


def make_bundle(name: str, loaded: Any, target: Any, folder: Path, precision: str = "fp16") -> Path:
    folders = {step: folder / step for step in ("graph", "engine", "bundle")}
    for path in folders.values():
        path.mkdir(parents=True)
    export_module(
        loaded.module,
        loaded.inputs,
        folders["graph"],
        precision=precision,
        exporter="dynamo",
        opset=18,
        patches=[],
        vocabulary=loaded.vocabulary,
    )
    module = backend(target.backend)
    specs = loaded.inputs
    graph = folders["graph"] / "model.onnx"
    save_with_weights_apart(onnx.load(graph), graph)
    result = module.build(graph_of(graph, specs, precision, name), folders["engine"], target)
    assert result.precisions[precision] > 0
    manifests.write(folders["graph"], graph_manifest(name, precision, specs))
    made = manifests.read(folders["graph"], manifests.Graph)
    if module.builds_without_weights(target):
        made = replace(manifests.structure_of_graph(made), files=made.files)
    manifests.write(folders["engine"], built_manifest(f"here-{name}", made, target, result))
    wrap_engine(folders["engine"], folders["bundle"], graph=folders["graph"])
    return folders["bundle"]


def check(module: Any, loaded: Any, seeds: tuple[int, ...] = (0, 1)) -> None:
    """Compare with PyTorch on two inputs: a graph that replays its recording would show."""
    for seed in seeds:
        inputs = example_inputs(loaded.inputs, "fp16", vocabulary=loaded.vocabulary, seed=seed)
        on_gpu = [tensor.cuda() for tensor in inputs]
        with torch.no_grad():
            expected = loaded.module.cuda()(*on_gpu)
            found = module(*on_gpu)
        found = found[0] if isinstance(found, (list, tuple)) else found
        assert difference(found.cpu(), expected.cpu()).rel_l2 < 1e-2


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["stream", "cuda_graph"])
@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("library", BACKENDS)
def test_an_engine_computes_what_pytorch_does(
    tiny_weights: Path, tmp_path: Path, library: str, name: str, cuda_graph: bool
) -> None:
    target = target_here(library)
    loaded = load(tiny_weights, name, "fp16")
    bundle = make_bundle(name, loaded, target, tmp_path)
    check(load_bundle(bundle, "cuda", cuda_graph=cuda_graph), loaded)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("library", BACKENDS)
def test_a_plan_without_weights_gets_those_of_its_bundle(
    tiny_weights: Path, tmp_path: Path, library: str, name: str
) -> None:
    target = target_here(library)
    stripped = replace(target, build=replace(target.build, weights="stripped"))
    loaded = load(tiny_weights, name, "fp16")
    bundles = {
        asked.build.weights: make_bundle(name, loaded, asked, tmp_path / asked.build.weights)
        for asked in (target, stripped)
    }
    check(load_bundle(bundles["stripped"], "cuda"), loaded)
    sizes = {key: (bundle / "engine.plan").stat().st_size for key, bundle in bundles.items()}
    assert sizes["stripped"] < sizes["embedded"]


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["stream", "cuda_graph"])
@pytest.mark.parametrize("library", BACKENDS)
def test_two_sizes_in_turn_keep_apart(tmp_path: Path, library: str, cuda_graph: bool) -> None:
    target = target_here(library)
    loaded: Any = SimpleNamespace(module=toy.network().half(), inputs=toy.INPUTS, vocabulary=0)
    bundle = make_bundle(toy.COMPONENT, loaded, target, tmp_path)
    module = load_bundle(bundle, "cuda", cuda_graph=cuda_graph)
    assert toy.compare(module, "cuda") < toy.TOLERANCE
    with torch.cuda.stream(torch.cuda.Stream()):  # not the default one
        assert toy.compare(module, "cuda") < toy.TOLERANCE


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["stream", "cuda_graph"])
def test_tensorrt_rtx_keeps_what_it_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool
) -> None:
    target = target_here("tensorrt_rtx")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    loaded: Any = SimpleNamespace(module=toy.network().half(), inputs=toy.INPUTS, vocabulary=0)
    bundle = make_bundle(toy.COMPONENT, loaded, target, tmp_path / "made")
    sizes = []
    for _ in range(2):
        toy.compare(load_bundle(bundle, "cuda", cuda_graph=cuda_graph), "cuda")
        (kernels,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        sizes.append(kernels.stat().st_size)
    assert sizes[0] > 0
    assert sizes[1] == sizes[0]  # nothing was compiled again


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_onnxruntime_computes_what_pytorch_does(
    tiny_weights: Path, tmp_path: Path, name: str
) -> None:
    loaded = load(tiny_weights, name, "fp16")
    bundle = make_bundle(name, loaded, target_here("onnxruntime"), tmp_path)
    module = load_bundle(bundle, "cuda")
    inputs = example_inputs(loaded.inputs, "fp16", vocabulary=loaded.vocabulary)
    assert module(*(tensor.cuda() for tensor in inputs)).is_cuda
    check(module, loaded, seeds=(0, 1, 2))  # a session that does not wait for PyTorch would show


def test_onnxruntime_in_fp32_is_fp32_unless_tf32_is_asked_for(
    tiny_weights: Path, tmp_path: Path
) -> None:
    """Against PyTorch on the CPU, whose fp32 is the reference's."""
    target = target_here("onnxruntime")
    loaded = load(tiny_weights, "vae_decoder", "fp32")
    inputs = example_inputs(loaded.inputs, "fp32")
    with torch.no_grad():
        expected = loaded.module(*inputs)
    errors = {}
    for tf32 in (False, True):
        asked = replace(target, build=replace(target.build, tf32=tf32))
        bundle = make_bundle("vae_decoder", loaded, asked, tmp_path / str(tf32), "fp32")
        found = load_bundle(bundle, "cuda")(*(tensor.cuda() for tensor in inputs))
        errors[tf32] = difference(found.cpu(), expected).rel_l2
    assert errors[False] < 1e-5
    assert errors[True] > 10 * errors[False]


# Both are PyTorch's own: while its compiler is imported, and while it warms up an empty graph.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_baseline_computes_what_pytorch_does(tiny_weights: Path, mode: str) -> None:
    loaded = load(tiny_weights, "unet", "fp16")
    options: Any = {"compile_mode": mode, "channels_last": True, "names": ["unet"]}
    network = torch_networks("fp16", "cuda", weights=tiny_weights, **options)["unet"]
    # From the third call on, "reduce-overhead" replays a CUDA graph, in the same memory.
    check(network, loaded, seeds=(0, 1, 2, 3, 4))


@pytest.mark.parametrize("builder", ["trtexec", "python"])
def test_both_builders_of_tensorrt_give_an_engine(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str
) -> None:
    target = target_here("tensorrt")
    if builder == "trtexec" and not shutil.which("trtexec"):
        pytest.skip("trtexec is not on PATH")
    if builder == "python":
        for module in ("building", "fingerprint"):
            name = f"diffusion_engines.backends.tensorrt.{module}.find_trtexec"
            monkeypatch.setattr(name, lambda: None)
    loaded = load(tiny_weights, "unet", "fp16")
    bundle = make_bundle("unet", loaded, target, tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert ("trtexec" in manifest["builder"]) == (builder == "trtexec")
    check(load_bundle(bundle, "cuda"), loaded)


@pytest.mark.parametrize("wrap", ["torchscript", "exported_program"])
@pytest.mark.parametrize("library", BACKENDS)
def test_a_wrap_computes_what_pytorch_does(
    tiny_weights: Path, tmp_path: Path, library: str, wrap: Wrap
) -> None:
    target = target_here(library, [wrap])
    try:
        wrap_fingerprint(library, [wrap])
    except HardwareError:
        pytest.skip(f"{DISTRIBUTIONS[library]} is not installed")
    loaded = load(tiny_weights, "unet", "fp16")
    bundle = make_bundle("unet", loaded, target, tmp_path)
    loads = {"torchscript": load_torchscript, "exported_program": load_exported_program}
    check(loads[wrap](bundle), loaded)


@pytest.mark.parametrize("library", BACKENDS)
def test_an_engine_of_another_gpu_is_an_exception_and_not_a_crash(
    tiny_weights: Path, tmp_path: Path, library: str
) -> None:
    target = target_here(library)
    bundle = make_bundle("vae_decoder", load(tiny_weights, "vae_decoder", "fp16"), target, tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["fingerprint"] |= {"compute_capability": "7.0", "compute_capabilities": ["7.5"]}
    write_json(bundle / "manifest.json", manifest)
    with pytest.raises(FingerprintError, match="was built for another GPU"):
        load_bundle(bundle, "cuda")
    done = subprocess.run(
        ["diffusion-engines", "check-bundle", bundle],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "was built for another GPU" in done.stderr
