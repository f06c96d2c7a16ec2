"""TensorRT-RTX engines on a GPU that it supports: `make test-gpu`. Awaits such a GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from diffusion_engines.backends import backend
from diffusion_engines.config import TensorRTRTXBuild, TensorRTRTXTarget
from diffusion_engines.files import write_manifest
from diffusion_engines.onnx.export import export_module
from diffusion_engines.parity.metrics import difference
from diffusion_engines.runtime.bundle import load_bundle, wrap_engine
from diffusion_engines.runtime.networks import example_inputs
from tests.conftest import load

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_an_engine_computes_what_pytorch_does(
    tiny_weights: Path, tmp_path: Path, name: str
) -> None:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    settings = TensorRTRTXBuild(None, "none", "layer_names_only")
    target = TensorRTRTXTarget("tensorrt_rtx", [capability], settings)
    loaded = load(tiny_weights, name, "fp16")
    folders = {step: tmp_path / step for step in ("graph", "engine", "bundle")}
    for folder in folders.values():
        folder.mkdir()
    export_module(
        loaded.module,
        loaded.inputs,
        folders["graph"],
        precision="fp16",
        exporter="dynamo",
        opset=18,
        patches=[],
        vocabulary=loaded.vocabulary,
    )
    module = backend("tensorrt_rtx")
    specs = [asdict(value) for value in loaded.inputs]
    result = module.build(folders["graph"] / "model.onnx", folders["engine"], target, specs, "fp16")
    info = {
        "name": name,
        "component": name,
        "inputs": specs,
        "backend": "tensorrt_rtx",
        "engine": result.engine,
        "fingerprint": module.fingerprint(target),
    }
    write_manifest(folders["engine"], "engine", info)
    wrap_engine(folders["engine"], folders["bundle"])
    inputs = example_inputs(loaded.inputs, "fp16", vocabulary=loaded.vocabulary)
    with torch.no_grad():
        expected = loaded.module.cuda()(*(tensor.cuda() for tensor in inputs))
        found = load_bundle(folders["bundle"], "cuda")(*(tensor.cuda() for tensor in inputs))
    assert difference(found.cpu(), expected.cpu()).rel_l2 < 1e-2
