"""SD 1.4 at full size with synthetic weights: `make test-full`, half an hour, 8 GB of memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from diffusion_engines.backends import backend
from diffusion_engines.config import Dynamic, Image, TensorRTRTXBuild, TensorRTRTXTarget
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.operators import graph_statistics
from diffusion_engines.onnx.simplify import simplify_graph
from diffusion_engines.runtime.networks import example_inputs, load_architecture, load_network
from diffusion_engines.weights.sources import fill_with_random_weights
from tests.conftest import COMPONENTS, ROOT

pytestmark = pytest.mark.full

IMAGE = Image(height=512, width=512, batch_size=1, vae_scale_factor=8)
STATIC = Dynamic(batch_size=None, height=None, width=None)
# The article's table, where today's exporter does not decompose differently.
UNET_OPERATORS = {
    "Conv": 98,
    "Gemm": 24,
    "Erf": 16,
    "Softmax": 32,
    "InstanceNormalization": 61,
    "Resize": 3,
    "Sin": 1,
    "Cos": 1,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd14") / "weights"
    folder.mkdir()
    fill_with_random_weights(ROOT / "conf/architecture/sd14", folder, seed=0, dtype="fp16")
    return folder


@contextlib.contextmanager
def fp16_as_gpus_compute_it() -> Iterator[None]:
    """Accumulate in fp32 and round each result to fp16, as a GPU's fp16 kernels do.

    PyTorch's own fp16 convolutions on a CPU without fp16 instructions are about 20 times slower:
    more than an hour for one call of the UNet.
    """
    functional = torch.nn.functional
    names = ("conv2d", "linear", "scaled_dot_product_attention")
    kept = {name: getattr(functional, name) for name in names}

    def wide(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*values: object, **options: object) -> torch.Tensor:
            def upcast(value: object) -> object:
                return value.float() if isinstance(value, torch.Tensor) else value

            named = {key: upcast(value) for key, value in options.items()}
            return function(*map(upcast, values), **named).half()

        return call

    for name, function in kept.items():
        setattr(functional, name, wide(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(functional, name, function)


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_simplified_graph_computes_what_pytorch_does(
    weights: Path, tmp_path: Path, name: str
) -> None:
    spec = COMPONENTS[name]
    folder = weights / spec.folder
    architecture = load_architecture(folder)
    inputs = spec.inputs(architecture, IMAGE, STATIC)
    module = load_network(spec, folder, "fp16")
    vocabulary = architecture.get("vocab_size", 0)
    for step in ("exported", "simplified"):
        (tmp_path / step).mkdir()
    export_module(
        module,
        inputs,
        tmp_path / "exported",
        precision="fp16",
        exporter="dynamo",
        opset=18,
        patches=[],
        vocabulary=vocabulary,
    )
    simplify_graph(tmp_path / "exported/model.onnx", tmp_path / "simplified", skipped_optimizers=[])
    simplified = tmp_path / "simplified" / "model.onnx"
    if name == "unet":
        operators = graph_statistics(simplified).operators
        assert {key: operators[key] for key in UNET_OPERATORS} == UNET_OPERATORS

    tensors = example_inputs(inputs, "fp16", vocabulary=vocabulary, seed=1)
    with torch.no_grad(), fp16_as_gpus_compute_it():
        expected = module(*tensors).double().numpy()
    del module
    session = onnxruntime.InferenceSession(simplified, providers=["CPUExecutionProvider"])
    feeds = {f"input_{i}": tensor.numpy() for i, tensor in enumerate(tensors)}
    found = session.run(None, feeds)[0].astype(np.float64)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{name}: relative L2 error to PyTorch fp16 {error:.2e}")
    assert error <= 3e-3


# The ways of exporting in conf/export/ that differ for graphs of one size.
EXPORTS = {
    "dynamo": ("dynamo", 18, []),
    "article": ("torchscript", 12, ["expand_for_broadcast_to", "explicit_attention"]),
}
ADA = TensorRTRTXTarget("tensorrt_rtx", ["8.9"], TensorRTRTXBuild(None, "none", "none", tf32=False))


@pytest.mark.parametrize("option", EXPORTS)
@pytest.mark.parametrize("name", COMPONENTS)
def test_tensorrt_rtx_parses_and_builds_the_exported_graph(
    weights: Path, tmp_path: Path, name: str, option: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    exporter, opset, patches = EXPORTS[option]
    spec = COMPONENTS[name]
    folder = weights / spec.folder
    architecture = load_architecture(folder)
    inputs = spec.inputs(architecture, IMAGE, STATIC)
    module = load_network(spec, folder, "fp16")
    vocabulary = architecture.get("vocab_size", 0)
    export_module(
        module,
        inputs,
        tmp_path,
        precision="fp16",
        exporter=exporter,
        opset=opset,
        patches=patches,
        vocabulary=vocabulary,
    )
    parameters = sum(p.numel() for p in module.parameters())
    del module
    started = time.perf_counter()
    result = backend("tensorrt_rtx").build(
        tmp_path / "model.onnx", tmp_path, ADA, [asdict(value) for value in inputs], "fp16"
    )
    size = (tmp_path / result.engine).stat().st_size
    print(f"{name}, {option}: {time.perf_counter() - started:.1f} s, {size / 1e6:.0f} MB")
    assert size >= 2 * parameters  # two bytes each, and code
