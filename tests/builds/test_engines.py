"""Backends build what was asked for, and refuse what they cannot build or run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_engines import manifests
from diffusion_engines.backends import backend, check_precision
from diffusion_engines.backends.nvidia.building import check_dtypes
from diffusion_engines.backends.onnxruntime.session import open_session
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from diffusion_engines.backends.probe import probe_target
from diffusion_engines.backends.tensorrt_rtx.building import builder_config
from diffusion_engines.backends.tensorrt_rtx.settings import TensorRTRTXBuild, TensorRTRTXTarget
from diffusion_engines.cpu import instruction_set
from diffusion_engines.errors import (
    BuildError,
    ConfigError,
    FingerprintError,
    HardwareError,
    IntegrityError,
)
from diffusion_engines.files import write_json
from diffusion_engines.runtime.bundle import load_bundle, wrap_engine
from diffusion_engines.runtime.networks import example_inputs
from tests.conftest import Exports, graph_of
from tests.manifests import built_manifest, graph_manifest

CPU = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild("all", tf32=False))
RTX_BUILD = TensorRTRTXBuild(None, "none", "layer_names_only", tf32=False)
RTX = TensorRTRTXTarget("tensorrt_rtx", ["8.9"], RTX_BUILD)
H100 = TensorRTRTXTarget("tensorrt_rtx", ["9.0"], RTX_BUILD)


@pytest.fixture(scope="module")
def exported(exports: Exports) -> dict:
    return {precision: exports("vae_decoder", precision) for precision in ("fp32", "fp16")}


def make_bundle(exported: dict, tmp_path: Path, target=CPU, precision: str = "fp32") -> Path:
    loaded, path = exported[precision]
    engine = tmp_path / "engine"
    engine.mkdir()
    module = backend(target.backend)
    result = module.build(graph_of(path, loaded.inputs, precision), engine, target)
    made = graph_manifest("vae_decoder", precision, loaded.inputs)
    manifests.write(engine, built_manifest("test-vae_decoder", made, target, result))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    wrap_engine(engine, bundle)
    return bundle


def edit_fingerprint(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["fingerprint"] |= changes
    write_json(bundle / "manifest.json", manifest)


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
def test_onnxruntime_computes_what_pytorch_does(exported: dict, tmp_path: Path, level: Any) -> None:
    loaded, _ = exported["fp32"]
    target = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild(level, tf32=False))
    engine = load_bundle(make_bundle(exported, tmp_path, target))
    inputs = example_inputs(loaded.inputs, "fp32")
    with torch.no_grad():
        expected = loaded.module(*inputs)
    torch.testing.assert_close(engine(*inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_session_that_fell_back_to_the_cpu_is_refused(tmp_path: Path) -> None:
    class Library:
        """What ONNX Runtime does where CUDA's libraries are missing: a warning, and the CPU."""

        __version__ = "1.0"

        @staticmethod
        def InferenceSession(*arguments: Any, **options: Any) -> Any:  # noqa: N802
            class Session:
                def get_providers(self) -> list[str]:
                    return ["CPUExecutionProvider"]

            return Session()

    with pytest.raises(HardwareError, match="could not start on cuda") as raised:
        open_session(Library, tmp_path, None, "cuda", tf32=False)
    assert "found:    CPUExecutionProvider" in str(raised.value)
    assert open_session(Library, tmp_path, None, "cpu", tf32=False)


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_engines_run_in_tf32_only_where_that_is_asked_for(tf32: bool) -> None:
    """It is on by default in both libraries; tests/gpu holds what ONNX Runtime makes of it."""

    class Library:
        @staticmethod
        def InferenceSession(*_: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:  # noqa: N802
            assert providers == [("CUDAExecutionProvider", {"use_tf32": "1" if tf32 else "0"})]
            return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])

    open_session(Library, Path(), None, "cuda", tf32=tf32)

    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger())
    target = replace(RTX, build=replace(RTX_BUILD, tf32=tf32))
    config = builder_config(trt, builder, target)
    assert config.get_flag(trt.BuilderFlag.TF32) is tf32


def test_onnxruntime_casts_to_what_the_graph_takes(exported: dict, tmp_path: Path) -> None:
    loaded, _ = exported["fp16"]
    engine = load_bundle(make_bundle(exported, tmp_path, precision="fp16"))
    output = engine(*example_inputs(loaded.inputs, "fp32"))
    assert output.dtype == torch.float16


def test_tensorrt_rtx_builds_without_a_gpu(exported: dict, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    loaded, path = exported["fp16"]
    module = backend("tensorrt_rtx")
    graph = graph_of(path, loaded.inputs, "fp16")
    result = module.build(graph, tmp_path, RTX)
    assert (tmp_path / result.engine).stat().st_size > 100_000
    assert result.precisions["fp16"] > 100
    assert result.layers["CONVOLUTION"] == 27
    with pytest.raises(BuildError, match="not what was asked for"):
        module.build(replace(graph, precision="fp32"), tmp_path, RTX)


def test_a_gpu_that_tensorrt_rtx_lacks_is_named() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    with pytest.raises(HardwareError, match=r"no compute capability 9\.0") as raised:
        backend("tensorrt_rtx").fingerprint(H100)
    assert "backend tensorrt" in str(raised.value)


@pytest.mark.parametrize("target", [CPU, RTX], ids=["onnxruntime", "tensorrt_rtx"])
def test_garbage_is_refused(tmp_path: Path, target) -> None:
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(BuildError, match=r"model\.onnx"):
        backend(target.backend).build(graph_of(tmp_path / "model.onnx", []), tmp_path, target)


def test_a_precision_that_the_backend_lacks_is_refused() -> None:
    check_precision("cpu-unet", "fp16", "onnxruntime")
    with pytest.raises(BuildError, match=r"engines\.cpu-unet\.precision.*no bf16"):
        check_precision("cpu-unet", "bf16", "onnxruntime")
    with pytest.raises(ConfigError, match="no such backend"):
        backend("nope")


def test_an_engine_in_another_precision_is_refused() -> None:
    check_dtypes(graph_of(Path("x"), [], "fp16"), {"fp16": 90, "fp32": 10})
    with pytest.raises(BuildError, match="mostly fp16"):
        check_dtypes(graph_of(Path("x"), [], "fp16"), {"fp16": 10, "fp32": 90})


def test_a_damaged_engine_is_caught_before_it_is_loaded(exported: dict, tmp_path: Path) -> None:
    bundle = make_bundle(exported, tmp_path)
    path = bundle / "engine.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"engine\.onnx is damaged"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"onnxruntime": "1.0"}, "another onnxruntime"),
        ({"instruction_set": "aarch64"}, "another instruction set"),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    exported: dict, tmp_path: Path, changes: dict, expected: str
) -> None:
    bundle = make_bundle(exported, tmp_path)
    edit_fingerprint(bundle, **changes)
    with pytest.raises(FingerprintError, match=expected) as raised:
        load_bundle(bundle)
    assert "dvc repro build@test-vae_decoder" in str(raised.value)


def test_tensorrt_rtx_is_refused_before_it_sees_a_foreign_engine(
    exported: dict, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    bundle = make_bundle(exported, tmp_path, RTX, "fp16")
    if not torch.cuda.is_available():
        with pytest.raises(HardwareError, match="needs an NVIDIA GPU"):
            load_bundle(bundle, "cuda")
    edit_fingerprint(bundle, tensorrt_rtx="1.0.0.1")
    with pytest.raises(FingerprintError, match="another TensorRT-RTX"):
        load_bundle(bundle, "cuda")


def test_a_probe_records_or_keeps_or_explains(tmp_path: Path) -> None:
    probe_target("cpu", CPU, tmp_path / "cpu.json", tmp_path / "cpu-wrap.json")
    recorded = json.loads((tmp_path / "cpu.json").read_text())
    assert recorded["instruction_set"] == instruction_set()
    assert json.loads((tmp_path / "cpu-wrap.json").read_text()) == {}

    with pytest.raises(HardwareError) as raised:
        probe_target("h100", H100, tmp_path / "h100.json", tmp_path / "h100-wrap.json")
    for text in ("cannot build for the target h100", "goes on with the targets", "dvc pull"):
        assert text in str(raised.value)
    assert not (tmp_path / "h100.json").exists()

    for name in ("h100.json", "h100-wrap.json"):
        write_json(tmp_path / name, {"recorded": "elsewhere"})
    probe_target("h100", H100, tmp_path / "h100.json", tmp_path / "h100-wrap.json")
    assert json.loads((tmp_path / "h100.json").read_text()) == {"recorded": "elsewhere"}
