"""TensorRT engines: the Python builder, and what is compared before an engine is loaded.

TensorRT's library is not here. Its Python API is TensorRT-RTX's too, so that the Python builder's
code runs on that for real, up to loading the result, which takes a GPU.
"""

from __future__ import annotations

import functools
import json
import operator
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_engines import manifests
from diffusion_engines.backends import backend, gpus, preflight, timing
from diffusion_engines.backends.gpus import Gpu
from diffusion_engines.backends.nvidia.running import binding_names
from diffusion_engines.backends.tensorrt import running
from diffusion_engines.backends.tensorrt.building import layers, python, versions
from diffusion_engines.backends.tensorrt.settings import TensorRTTarget
from diffusion_engines.config import Dynamic
from diffusion_engines.errors import BuildError, FingerprintError, HardwareError, IntegrityError
from diffusion_engines.files import write_json
from diffusion_engines.manifests import Bundle
from diffusion_engines.runtime.bundle import check_bundle, load_bundle
from tests.conftest import Exports, graph_of
from tests.doubles.launcher import install
from tests.manifests import bundle_manifest, engine_manifest
from tests.unit.backends.test_trtexec import BUILD

A10 = Gpu("NVIDIA A10", "8.6")
TARGET = TensorRTTarget("tensorrt", "A10", "8.6", [], BUILD)
PLATFORM = preflight.platform_name()


@pytest.fixture(scope="module")
def graph(exports: Exports) -> Any:
    dynamic = Dynamic([1, 4], [64, 256], [64, 256])
    loaded, path = exports("vae_decoder", "fp16", dynamic=dynamic)
    return graph_of(path, loaded.inputs, "fp16")


# TensorRT-RTX deprecates timing caches, of which TensorRT's API is the same.
TIMING = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@TIMING
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workspace_mib": 512, "max_aux_streams": 0, "tf32": True, "optimization_level": 0},
        {"profiling_verbosity": "layer_names_only", "timing_cache": False},
        {"hardware_compatibility": "ampere_plus"},
    ],
    ids=lambda changes: ",".join(changes) or "default",
)
def test_the_python_builder_builds_with_tensorrt_rtx(
    graph: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    loaded_again: list[Path] = []
    monkeypatch.setattr(python, "_write_layers", lambda *args: loaded_again.append(args[2]))
    build = replace(BUILD, **changes)
    log = python.build_with_python(trt, (10, 13, 0), graph, tmp_path, build)
    assert (tmp_path / "engine.plan").stat().st_size > 1_000_000
    assert (tmp_path / "timing.cache").exists() == build.timing_cache
    assert loaded_again == [tmp_path]
    assert "minShape is not the same as maxShape" in log
    if build.timing_cache:  # read again, by the library itself
        python.build_with_python(trt, (10, 13, 0), graph, tmp_path, build)


@TIMING
def test_the_python_builder_says_what_the_library_refuses(graph: Any, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    garbage = graph_of(tmp_path / "model.onnx", [], "fp16")
    with pytest.raises(BuildError, match=r"could not parse .*model\.onnx"):
        python.build_with_python(trt, (10, 13, 0), garbage, tmp_path, BUILD)
    # Not of this library: it fails in the build itself.
    build = replace(BUILD, version_compatible=True)
    with pytest.raises(BuildError, match="failed to build"):
        python.build_with_python(trt, (10, 13, 0), graph, tmp_path, build)


def test_settings_reach_the_builder(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    build = replace(
        BUILD,
        workspace_mib=64,
        max_aux_streams=3,
        version_compatible=True,
        exclude_lean_runtime=True,
        weights="stripped",
        timing_cache=False,
    )
    config = builder.create_builder_config()
    assert python.apply_settings(trt, config, build, tmp_path / "none") is None
    flags = {name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)}
    assert flags >= {
        "VERSION_COMPATIBLE",
        "EXCLUDE_LEAN_RUNTIME",
        "STRIP_PLAN",
        "REFIT",
    }
    # A plan of REFIT_IDENTICAL fits the weights of its build alone.
    assert not {"TF32", "REFIT_IDENTICAL"} & flags
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.max_aux_streams == 3
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("Row major linear FP32", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear BF16 format", "bf16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("FP8", "fp8"),
        ("Int64", None),
        ("Bool", None),
        ("N/A due to dynamic shapes", None),
    ],
)
def test_precisions_are_read_in_the_words_of_each_release(text: str, expected: str | None) -> None:
    assert layers.precision_of({"Format/Datatype": text}) == expected
    assert layers.precision_of({"Format": "Linear", "Datatype": text}) == expected  # 11


@pytest.mark.parametrize("field", ["Format/Datatype", "Datatype"])
def test_layer_information_of_each_schema_is_read(tmp_path: Path, field: str) -> None:
    path = tmp_path / "layers.json"
    outputs = [{"Name": "a", "Dimensions": [1], field: "Half"}, {"Name": "b", field: "Int64"}]
    write_json(path, {"Layers": [{"Name": "x", "LayerType": "gemm", "Outputs": outputs}]})
    assert layers.read_layers(path) == ({"gemm": 1}, {"fp16": 1})


def test_detailed_layers_without_dtypes_are_an_error_and_no_pass(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    write_json(
        path, {"Layers": [{"LayerType": "gemm", "Outputs": [{"Name": "a", "Type": "FP16"}]}]}
    )
    with pytest.raises(BuildError, match="has layers and no dtypes") as raised:
        layers.read_layers(path)
    assert "found:    outputs with Name, Type" in str(raised.value)
    write_json(path, {"Layers": ["a", "b"]})  # names alone
    assert layers.read_layers(path) == ({}, {})


def test_the_python_api_builds_from_10_on_and_trtexec_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "library", lambda: SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(HardwareError, match="too old to build through its Python API") as raised:
        versions.builder_version(None)
    assert "put trtexec on PATH (from 8.6.0 on)" in str(raised.value)
    assert versions.builder_version((Path("trtexec"), (8, 6, 1))) == (8, 6, 1)


def test_layer_information_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    for content in (None, "", "[]", '{"Layer": []}'):
        if content is not None:
            path.write_text(content)
        with pytest.raises(BuildError, match="not TensorRT's layer information"):
            layers.read_layers(path)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (None, "no GPU that PyTorch sees"),
        (Gpu("NVIDIA A100-SXM4-40GB", "8.0"), "NVIDIA A100-SXM4-40GB"),
        (Gpu("NVIDIA GeForce RTX 3090", "8.6"), "NVIDIA GeForce RTX 3090"),
    ],
)
def test_a_target_is_built_on_its_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, expected: str
) -> None:
    monkeypatch.setattr(gpus, "find_gpu", lambda: gpu)
    with pytest.raises(HardwareError, match="not the A10 of the target") as raised:
        backend("tensorrt").fingerprint(TARGET)
    assert "expected: A10, compute capability 8.6" in str(raised.value)
    assert expected in str(raised.value)


def test_a_fingerprint_holds_what_an_engine_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "bin", "trtexec")
    install(tmp_path / "bin", "nvidia-smi", "print('575.57.08')\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRTEXEC_DOUBLE_RELEASE", "10.16")
    monkeypatch.setattr(gpus, "find_gpu", lambda: A10)
    found = backend("tensorrt").fingerprint(TARGET)
    assert dict(found) | {"cuda": None} == {
        "tensorrt": "10.16.0",
        "cuda": None,
        "driver": "575",
        "gpu": "NVIDIA A10",
        "compute_capability": "8.6",
        "platform": PLATFORM,
    }


def test_a_tensorrt_before_8_6_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "bin", "trtexec", "print('&&&& RUNNING TensorRT.trtexec [TensorRT v8503]')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(gpus, "find_gpu", lambda: A10)
    with pytest.raises(HardwareError, match="too old") as raised:
        backend("tensorrt").fingerprint(TARGET)
    assert "found:    8.5.3" in str(raised.value)


def test_bindings_are_in_the_order_of_their_numbers() -> None:
    modes = SimpleNamespace(INPUT="in", OUTPUT="out")
    names = ["input_10", "output_1", "output_0", "input_2", "input_0"]
    engine = SimpleNamespace(
        num_io_tensors=len(names),
        get_tensor_name=lambda index: names[index],
        get_tensor_mode=lambda name: "out" if name.startswith("out") else "in",
    )
    trt = SimpleNamespace(TensorIOMode=modes)
    inputs, outputs = binding_names(trt, engine)
    assert inputs == ["input_0", "input_2", "input_10"]
    assert outputs == ["output_0", "output_1"]


def manifest(**build: Any) -> Bundle:
    return bundle_manifest(
        "a10-unet",
        backend="tensorrt",
        builder="trtexec 10.13.3",
        engine="engine.plan",
        settings={"build": asdict(replace(BUILD, **build))},
        fingerprint={
            "tensorrt": "10.13.3",
            "gpu": A10.name,
            "compute_capability": A10.capability,
            "platform": PLATFORM,
        },
    )


def on(bundle: Bundle, **fingerprint: Any) -> Bundle:
    return replace(bundle, fingerprint={**bundle.fingerprint, **fingerprint})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An A10 with TensorRT 10.13.3 whose runtime must not be asked to load anything."""
    state = SimpleNamespace(gpu=A10, version="10.13.3.9")
    monkeypatch.setattr(gpus, "find_gpu", lambda: state.gpu)
    monkeypatch.setattr(running, "library", lambda: SimpleNamespace(__version__=state.version))
    return state


# A plan without the runtime that later releases would run it with.
LEAN = {"version_compatible": True, "exclude_lean_runtime": True}
LATER, OTHER_MAJOR, EARLIER = "10.14.0.1", "11.1.0.106", "10.12.0.36"
A10G, H100 = Gpu("NVIDIA A10G", "8.6"), Gpu("NVIDIA H100 80GB HBM3", "9.0")
RTX2080 = Gpu("NVIDIA GeForce RTX 2080", "7.5")


@pytest.mark.parametrize(
    ("build", "version", "gpu", "problem"),
    [
        ({}, "10.13.3.9", A10, None),
        ({}, LATER, A10, "another TensorRT"),
        ({}, EARLIER, A10, "another TensorRT"),
        ({}, OTHER_MAJOR, A10, "another TensorRT"),
        ({"version_compatible": True}, LATER, A10, None),
        ({"version_compatible": True}, EARLIER, A10, "another TensorRT"),
        ({"version_compatible": True}, OTHER_MAJOR, A10, "another TensorRT"),
        (LEAN, LATER, A10, "another TensorRT"),
        (LEAN, "10.13.3.9", A10, None),
        ({}, "10.13.3.9", A10G, "another GPU"),
        ({}, "10.13.3.9", H100, "another GPU"),
        ({}, "10.13.3.9", None, "needs an NVIDIA GPU"),
        ({"hardware_compatibility": "same_compute_capability"}, "10.13.3.9", A10G, None),
        ({"hardware_compatibility": "same_compute_capability"}, "10.13.3.9", H100, "another GPU"),
        ({"hardware_compatibility": "ampere_plus"}, "10.13.3.9", H100, None),
        ({"hardware_compatibility": "ampere_plus"}, "10.13.3.9", RTX2080, "another GPU"),
    ],
)
def test_only_an_engine_that_fits_is_loadable(
    machine: SimpleNamespace, build: dict[str, Any], version: str, gpu: Gpu, problem: str | None
) -> None:
    machine.version, machine.gpu = version, gpu
    if problem is None:
        backend("tensorrt").check_loadable(manifest(**build))
        return
    with pytest.raises((FingerprintError, HardwareError), match=problem) as raised:
        backend("tensorrt").check_loadable(manifest(**build))
    for label in ("expected:", "found:", "fix:"):
        assert label in str(raised.value)


def test_another_platform_is_refused(machine: SimpleNamespace) -> None:
    foreign = on(manifest(), platform="linux-aarch64")
    with pytest.raises(FingerprintError, match="another platform") as raised:
        backend("tensorrt").check_loadable(foreign)
    assert "expected: linux-aarch64" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("tensorrt", "fingerprint.tensorrt"),
        ("tensorrt", "fingerprint.gpu"),
        ("tensorrt", "fingerprint.compute_capability"),
        ("tensorrt", "fingerprint.platform"),
        ("tensorrt", "settings.build.version_compatible"),
        ("tensorrt_rtx", "fingerprint.tensorrt_rtx"),
        ("tensorrt_rtx", "fingerprint.compute_capabilities"),
    ],
)
def test_a_manifest_that_says_too_little_is_no_permission(
    machine: SimpleNamespace, name: str, path: str
) -> None:
    incomplete = on(manifest(), tensorrt_rtx="1.7.1.116", compute_capabilities=["8.6"])
    *sections, key = path.split(".")
    functools.reduce(operator.getitem, sections, vars(incomplete)).pop(key)
    with pytest.raises(IntegrityError, match="is incomplete") as raised:
        backend(name).check_loadable(incomplete)
    assert path in str(raised.value)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "find_gpu", lambda: A10)
    with pytest.raises(HardwareError, match="library tensorrt is not installed") as raised:
        backend("tensorrt").check_loadable(manifest())
    assert "pip install tensorrt" in str(raised.value)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ImportError('libnvinfer.so.10: cannot open')", "libnvinfer.so.10: cannot open"),
        ("raise FileNotFoundError('Could not find: libnvinfer.so')", "Could not find: libnvinfer"),
        ("__version__ = '10.13.3.9'", "bindings and libnvinfer"),
    ],
)
def test_bindings_without_the_library_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(HardwareError) as raised:
        backend("tensorrt").check_loadable(manifest())
    assert expected in str(raised.value)
    assert "NVIDIA's containers" in str(raised.value)
    sys.modules.pop("tensorrt", None)


def make_bundle(folder: Path, info: Bundle) -> Path:
    folder.mkdir(parents=True)
    (folder / "engine.plan").write_bytes(b"a plan that nothing here may read")
    manifests.write(folder, info)
    return folder


def test_the_remedy_names_the_target_and_the_engines_that_fit(
    machine: SimpleNamespace, tmp_path: Path
) -> None:
    here = make_bundle(tmp_path / "bundles/a10/unet", manifest())
    h100 = on(manifest(), gpu=H100.name, compute_capability=H100.capability)
    fitting = make_bundle(tmp_path / "bundles/h100/unet", h100)
    make_bundle(tmp_path / "bundles/h100/vae_decoder", h100)
    broken = make_bundle(tmp_path / "bundles/broken/unet", h100) / "manifest.json"
    write_json(broken, {"kind": "bundle", "files": {}, "backend": "tensorrt"})
    machine.gpu = H100
    assert check_bundle(fitting).name == "a10-unet"
    with pytest.raises(FingerprintError, match="built for another GPU") as raised:
        load_bundle(here, "cuda")
    message = str(raised.value)
    assert "expected: NVIDIA A10, compute capability 8.6" in message
    assert "found:    NVIDIA H100 80GB HBM3, compute capability 9.0" in message
    assert "target h100" in message
    assert message.endswith(f"This machine can load: {fitting}")


def test_hashes_come_before_everything_else(machine: SimpleNamespace, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundles/a10/unet", manifest())
    (bundle / "engine.plan").write_bytes(b"b plan that nothing here may read")
    machine.gpu = H100
    with pytest.raises(IntegrityError, match=r"engine\.plan is damaged"):
        load_bundle(bundle, "cuda")
    (bundle / "engine.plan").unlink()
    with pytest.raises(IntegrityError, match=r"engine\.plan is missing"):
        load_bundle(bundle, "cuda")


def test_timing_caches_are_kept_by_fingerprint(tmp_path: Path) -> None:
    kept = tmp_path / "artifacts" / "timing" / "a10"
    first, second = {"tensorrt": "10.13.3"}, {"tensorrt": "10.14.0"}
    for fingerprint, text in ((first, "one"), (second, "two"), (first, "three")):
        engine = tmp_path / "artifacts" / "engines" / "a10" / "unet"
        engine.mkdir(parents=True, exist_ok=True)
        (engine / "timing.cache").write_text(text)
        manifests.write(engine, engine_manifest("a10-unet", fingerprint=fingerprint))
        timing.collect_timing_caches(kept, {"unet": engine})
    found = {
        json.dumps(fingerprint): path.read_text()
        for fingerprint in (first, second)
        if (path := timing.find_timing_cache(kept, "unet", fingerprint))
    }
    assert list(found.values()) == ["three", "two"]
    assert timing.find_timing_cache(kept, "unet", {"tensorrt": "11.1.0"}) is None
    assert timing.find_timing_cache(kept, "vae_decoder", first) is None
