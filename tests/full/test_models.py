"""SDXL at full size with synthetic weights: each component, from weights to a TensorRT-RTX engine.

`python -m pytest -m full -s tests/full/test_models.py`: prints time and peak memory of each step.
About 20 GB of disk below the temporary folder (`--basetemp=…`) and up to 24 GB of memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffusion_engines.backends import backend
from diffusion_engines.backends.tensorrt_rtx.settings import TensorRTRTXBuild, TensorRTRTXTarget
from diffusion_engines.config import Image
from diffusion_engines.families import family_of
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.graph import DATA, MODEL, check_graph
from diffusion_engines.onnx.operators import graph_statistics
from diffusion_engines.onnx.simplify import check_same_results, simplify_graph
from diffusion_engines.progress import LOG, step
from diffusion_engines.runtime.networks import load_network, read_config
from diffusion_engines.weights.check import count_parameters
from diffusion_engines.weights.sources import fill_with_random_weights
from tests.conftest import ROOT, STATIC, graph_of
from tests.models import section

pytestmark = pytest.mark.full

MEMORY = 24e9
PRECISIONS = {  # those of fleet=sdxl, whose VAE overflows in fp16
    "text_encoder": "fp16",
    "text_encoder_2": "fp16",
    "unet": "fp16",
    "vae_decoder": "fp32",
}
ADA = TensorRTRTXTarget("tensorrt_rtx", ["8.9"], TensorRTRTXBuild(None, "none", "none", tf32=False))


@pytest.mark.parametrize("name", PRECISIONS)
def test_sdxl_becomes_engines_within_24_gb(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    weights, exported, simplified, engine = (
        tmp_path / name for name in ("weights", "exported", "simplified", "engine")
    )
    for folder in (weights, exported, simplified, engine):
        folder.mkdir()
    first = len(LOG.steps)
    with step("random weights of sdxl"):
        fill_with_random_weights(ROOT / "conf/architecture/sdxl", weights, seed=0, dtype="fp16")
    precision = PRECISIONS[name]
    spec = family_of(weights).component(name)
    folder = weights / spec.folder
    parameters = section("sdxl", "model")["parameters"][spec.folder]
    assert count_parameters(folder) == parameters
    architecture = read_config(spec, folder)
    inputs = spec.inputs(architecture, Image(**section("sdxl", "image")), STATIC)
    if name == "unet":
        assert inputs[0].size == (2, 4, 128, 128)
    with step(f"load {name}-{precision}"):
        module = load_network(spec, folder, precision)
    with step("export with dynamo, opset 18"):
        export_module(
            module,
            inputs,
            exported,
            precision=precision,
            exporter="dynamo",
            opset=18,
            patches=[],
            outputs=[value.name for value in spec.outputs],
            vocabulary=architecture.get("vocab_size", 0),
        )
    del module
    shutil.rmtree(weights)  # disk
    simplify_graph(exported / MODEL, simplified, skipped_optimizers=[])
    # No copy of the weights beside those that belong to the graph.
    assert sorted(path.name for path in simplified.iterdir()) == [MODEL, DATA]
    with step("check the graph"):
        check_graph(simplified / MODEL, opset=18, writer="onnxsim", outputs=len(spec.outputs))
    error = check_same_results(exported / MODEL, simplified / MODEL, seed=0, allowed=2e-3)
    shutil.rmtree(exported)
    statistics = graph_statistics(simplified / MODEL)
    assert statistics.macs is not None
    print(f"  {statistics.nodes} nodes, {statistics.macs / 1e9:.0f} GMACs, error {error:.1e}")
    with step("build for sm_89 with tensorrt_rtx"):
        graph = graph_of(simplified / MODEL, inputs, precision)
        result = backend("tensorrt_rtx").build(graph, engine, ADA)
    size = (engine / result.engine).stat().st_size
    print(f"  {size / 1e6:.0f} MB")
    # Two bytes each, and code; of the VAE, the decoder alone, in four bytes; of the text encoders
    # all but the last layer, whose output the UNet does not take: a twelfth of the first one's.
    assert size >= 1.85 * parameters
    peak = max(int(entry["peak_memory_bytes"]) for entry in LOG.steps[first:])
    print(f"  peak of all steps {peak / 1e9:.2f} GB")
    assert peak < MEMORY
