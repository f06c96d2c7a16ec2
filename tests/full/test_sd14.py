"""SD 1.4 at full size, synthetic weights: `make test-full`, a quarter of an hour, 12 GB."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from diffusion_engines.config import Dynamic, Image
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.operators import graph_statistics
from diffusion_engines.onnx.simplify import simplify_graph
from diffusion_engines.runtime.networks import example_inputs, load_network, read_config
from diffusion_engines.weights.sources import fill_with_random_weights
from tests.conftest import COMPONENTS, ROOT
from tests.conversion import OPTIONS, PRECISIONS, case_of_conf, check_conversion

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
    architecture = read_config(spec, folder)
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_export_in_conf_is_parsed_and_built(
    weights: Path, tmp_path: Path, option: str, name: str, precision: str
) -> None:
    case = case_of_conf(option, name, precision)
    (tmp_path / "graph").mkdir()
    started = time.perf_counter()
    check_conversion(case, weights, tmp_path / "graph", IMAGE)
    size = sum(file.stat().st_size for file in (tmp_path / "graph").glob("*.plan"))
    seconds = time.perf_counter() - started
    print(f"{name} {precision}, {option}: {seconds:.0f} s, {size / 1e6:,.0f} MB")
    shutil.rmtree(tmp_path / "graph")  # disk
