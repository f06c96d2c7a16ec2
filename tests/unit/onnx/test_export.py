"""What an export leaves behind: equal files everywhere, and errors that say what was wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import onnx
import pytest
import torch

from diffusion_engines.errors import ExportError
from diffusion_engines.families.base import Dim, TensorSpec
from diffusion_engines.onnx import export as module_of_export
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.graph import DATA, MODEL, check_graph
from diffusion_engines.onnx.tracing import shapes_alone
from diffusion_engines.runtime.networks import example_inputs
from diffusion_engines.runtime.open_dims import traceable
from tests.conftest import COMPONENTS, load
from tests.tiers import long, long_but

INPUTS = (TensorSpec("input_0", "latents", "component", (2, 4, 8, 8)),)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(4, 64, 3, padding=1)
        self.linear = torch.nn.Linear(64, 16)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.linear(self.convolution(latents).mean((2, 3)))


class Eigenvalues(torch.nn.Module):
    """No ONNX operator exists for this."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(latents).abs()


def export(module: torch.nn.Module, folder: Path, exporter: str, opset: int = 18) -> Path:
    export_module(
        module.eval(),
        INPUTS,
        folder,
        precision="fp32",
        exporter=exporter,
        opset=opset,
        patches=[],
    )
    return folder / MODEL


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_large_weights_are_external_and_readable_by_others(tmp_path: Path, exporter: str) -> None:
    path = export(Small(), tmp_path, exporter)
    assert sorted(file.name for file in tmp_path.iterdir()) == [MODEL, DATA]
    model = onnx.load(path, load_external_data=False)
    kernel = next(i for i in model.graph.initializer if list(i.dims) == [64, 4, 3, 3])
    assert kernel.data_location == onnx.TensorProto.EXTERNAL
    assert (tmp_path / DATA).stat().st_size >= 64 * 4 * 3 * 3 * 4
    assert (tmp_path / DATA).stat().st_mode == path.stat().st_mode


@long
def test_exports_of_two_processes_are_equal_byte_for_byte(
    tiny_weights: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.conftest import load\n"
        "from diffusion_engines.onnx.export import export_module\n"
        "loaded = load(Path(sys.argv[1]), 'text_encoder')\n"
        "Path(sys.argv[2]).mkdir()\n"
        "export_module(loaded.module, loaded.inputs, Path(sys.argv[2]), precision='fp32',\n"
        "    exporter='dynamo', opset=18, patches=[], vocabulary=loaded.vocabulary)\n"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, tiny_weights, tmp_path / seed],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert done.returncode == 0, done.stderr
    for file in (MODEL, DATA):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


@pytest.mark.parametrize(
    ("exporter", "expected", "fix"),
    [
        ("dynamo", "No ONNX function found for", "export.exporter=torchscript"),
        ("torchscript", "aten::linalg_eigvals", "export.exporter=dynamo"),
    ],
)
def test_a_failure_names_its_cause_instead_of_advice_to_developers(
    tmp_path: Path, exporter: str, expected: str, fix: str
) -> None:
    with pytest.raises(ExportError, match=f"the {exporter} exporter failed at opset 17") as raised:
        export(Eigenvalues(), tmp_path, exporter, 17)
    assert expected in str(raised.value)
    assert fix in str(raised.value)
    assert "\x1b[" not in str(raised.value)
    assert "submit a PR" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "precision"),
    long_but([("unet", "fp16")], product(COMPONENTS, ["fp32", "fp16"])),
)
def test_tracing_without_arithmetic_changes_nothing_of_the_graph(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    precision: str,
) -> None:
    loaded = load(tiny_weights, name, precision)
    args = example_inputs(loaded.inputs, precision, vocabulary=loaded.vocabulary, seed=3)
    with torch.no_grad():
        before = loaded.module(*args)
    for step in ("shapes", "computed"):
        (tmp_path / step).mkdir()
        if step == "computed":
            monkeypatch.setattr(module_of_export, "shapes_alone", contextlib.nullcontext)
        export_module(
            loaded.module,
            loaded.inputs,
            tmp_path / step,
            precision=precision,
            exporter="torchscript",
            opset=12,
            patches=["explicit_attention"],
            vocabulary=loaded.vocabulary,
        )
    for file in (MODEL, DATA):
        assert (tmp_path / "shapes" / file).read_bytes() == (
            tmp_path / "computed" / file
        ).read_bytes()
    with torch.no_grad():
        assert torch.equal(loaded.module(*args), before)  # PyTorch's own kernels are back


def test_a_trace_without_arithmetic_computes_no_product_and_no_slow_convolution() -> None:
    values, kernels = torch.ones(2, 3, 8, 8).half(), torch.ones(5, 3, 3, 3).half()
    # The kernel itself: on a CPU that knows fp16, a convolution takes another.
    convolve = torch.ops.aten._slow_conv2d_forward
    with shapes_alone():
        convolved = convolve(values, kernels, [3, 3], None, [2, 2], [1, 1])
        assert convolved.shape == (2, 5, 4, 4)
        assert not convolved.any()
        assert not (values[0] @ values[1]).any()
    assert (values[0] @ values[1]).all()
    assert convolve(values, kernels, [3, 3], None, [2, 2], [1, 1]).all()


def test_an_opset_that_torchscript_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="failed at opset 24") as raised:
        export(Small(), tmp_path, "torchscript", 24)
    assert "ask for an opset from 14 to 23" in str(raised.value)


def test_the_exporters_loggers_are_restored(tmp_path: Path) -> None:
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    export(Small(), tmp_path, "torchscript")
    assert levels == {name: logging.getLogger(name).level for name in levels}


def test_the_converters_traceback_about_an_opset_is_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match="another opset than asked for"):
        export(Small(), tmp_path, "dynamo", 12)
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_open_dimensions_are_traced_at_two_steps_or_more() -> None:
    shape = (Dim("batch", 2, 2, 8, 2), 4, Dim("height", 64, 8, 96, 8), Dim("width", 1, 1, 1))
    traced = traceable(TensorSpec("input_0", "latents", "component", shape))
    assert traced.size == (4, 4, 64, 1)


def test_other_names_than_engines_need_are_refused(tmp_path: Path) -> None:
    path = export(Small(), tmp_path, "torchscript")
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].name = "latents"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "input_0":
                node.input[index] = "latents"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="other names") as raised:
        check_graph(path, opset=18, writer="a test")
    assert "expected: input_0, output_0" in str(raised.value)
    assert "found:    latents, output_0" in str(raised.value)
