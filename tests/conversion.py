"""What conf/ can export, and whether TensorRT's parser takes it and its builder builds it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_engines import precisions
from diffusion_engines.backends import backend
from diffusion_engines.backends.tensorrt_rtx.settings import TensorRTRTXBuild, TensorRTRTXTarget
from diffusion_engines.compose import compose_params
from diffusion_engines.config import (
    Export,
    Image,
    sections_from_config,
)
from diffusion_engines.errors import BuildError, DiffusionEnginesError, ExportError
from diffusion_engines.onnx.export import export_module
from tests.conftest import IMAGE, ROOT, graph_of, load

ADA = TensorRTRTXTarget("tensorrt_rtx", ["8.9"], TensorRTRTXBuild(None, "none", "none", tf32=False))
OPTIONS = sorted(path.stem for path in (ROOT / "conf/export").glob("*.yaml"))
PRECISIONS = ("fp32", "fp16", "bf16")
BF16_OPSET = precisions.PRECISIONS["bf16"].opset
# What is refused, by which error: the TorchScript exporter's text encoders in half precision.
# (Exporter, opset, component, precision.)
_REFUSED: dict[tuple[str, int, str, str], tuple[type[DiffusionEnginesError], str]] = {
    # Most of the graph is in fp32.
    **{
        ("torchscript", opset, "text_encoder", "fp16"): (BuildError, "expected: mostly fp16")
        for opset in range(14, 17)
    },
    # No runtime takes them: LayerNormalization, an operator since opset 17, gets a float input
    # beside float16 weights.
    **{
        ("torchscript", opset, "text_encoder", "fp16"): (ExportError, "wrote an invalid graph")
        for opset in range(17, 24)
    },
    # The exporter takes bf16 for complex numbers.
    **{
        ("torchscript", opset, "text_encoder", "bf16"): (ExportError, "unexpected tensor scalar")
        for opset in range(22, 24)
    },
}


@dataclass(frozen=True)
class Case:
    """One graph: how it is exported, and of what."""

    export: Export
    component: str
    precision: str

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.export.exporter, self.export.opset, self.component, self.precision


def composed(folder: Path, *overrides: str) -> dict[str, Any]:
    for name in ("conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__py*"))
    compose_params([*overrides], folder)
    return yaml.safe_load((folder / "params.yaml").read_text())


def case_of_conf(option: str, component: str, precision: str, folder: Path) -> Case:
    """Return what an option of conf/export/ means for a component; skip where nothing."""
    (export,) = sections_from_config(composed(folder, f"export={option}"), ["export"]).values()
    if precision == "bf16" and export.opset < BF16_OPSET:
        if option != "dynamo":
            pytest.skip(f"ONNX has no bf16 convolutions at opset {export.opset}")
        # The one exporter that is current, at the first opset that has them.
        export = Export(export.exporter, BF16_OPSET, export.patches, export.dynamic)
    return Case(export, component, precision)


def check_conversion(case: Case, weights: Path, folder: Path, image: Image = IMAGE) -> None:
    """Export, parse and build in ``folder``: most tensors have the precision asked for."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    if case.key in _REFUSED:
        error, words = _REFUSED[case.key]
        with pytest.raises(error, match=words):
            _convert(case, weights, folder, image)
        return
    precisions = _convert(case, weights, folder, image)
    # TorchScript at opset 12 computes attention masks and embeddings in fp32, among others.
    assert precisions[case.precision] >= 0.75 * sum(precisions.values())


def _convert(case: Case, weights: Path, folder: Path, image: Image) -> dict[str, int]:
    loaded = load(weights, case.component, case.precision, case.export.dynamic, image)
    export_module(
        loaded.module,
        loaded.inputs,
        folder,
        precision=case.precision,
        exporter=case.export.exporter,
        opset=case.export.opset,
        patches=case.export.patches,
        vocabulary=loaded.vocabulary,
    )
    inputs = [asdict(value) for value in loaded.inputs]
    parameters = sum(parameter.numel() for parameter in loaded.module.parameters())
    del loaded
    graph = graph_of(folder / "model.onnx", inputs, case.precision, case.component)
    result = backend("tensorrt_rtx").build(graph, folder, ADA)
    assert (folder / result.engine).stat().st_size >= 2 * parameters
    return dict(result.precisions)
