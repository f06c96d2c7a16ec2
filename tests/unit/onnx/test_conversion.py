"""Every way of exporting in conf/ gives graphs that TensorRT's parser takes and its builder builds.

TensorRT-RTX does it here, on a CPU, with the parser that TensorRT has too.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_engines.backends import backend
from diffusion_engines.compose import compose_params
from diffusion_engines.config import (
    Export,
    TensorRTRTXBuild,
    TensorRTRTXTarget,
    sections_from_config,
)
from diffusion_engines.errors import ExportError
from diffusion_engines.fleet import BF16_OPSET, OPSETS, OPSETS_WITH_EXPLICIT_ATTENTION
from diffusion_engines.onnx.export import export_module
from tests.conftest import COMPONENTS, ROOT, STATIC, load

ADA = TensorRTRTXTarget("tensorrt_rtx", ["8.9"], TensorRTRTXBuild(None, "none", "none", tf32=False))
OPTIONS = sorted(path.stem for path in (ROOT / "conf/export").glob("*.yaml"))
FLEETS = sorted(path.stem for path in (ROOT / "conf/fleet").glob("*.yaml"))
# Graphs that no runtime takes: LayerNormalization, an operator since opset 17, gets a float input
# beside float16 weights. The export stage refuses them.
INVALID = {("torchscript", opset, "text_encoder", "fp16") for opset in range(17, 24)}


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


def convert(case: Case, weights: Path, folder: Path) -> dict[str, int]:
    """Export, parse and build; return the tensors by precision."""
    loaded = load(weights, case.component, case.precision, case.export.dynamic)
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
    result = backend("tensorrt_rtx").build(
        folder / "model.onnx", folder, ADA, inputs, case.precision
    )
    assert (folder / result.engine).stat().st_size > 50_000
    return result.precisions


def check(case: Case, weights: Path, folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    if case.key in INVALID:
        with pytest.raises(ExportError, match="wrote an invalid graph"):
            convert(case, weights, folder)
        return
    precisions = convert(case, weights, folder)
    # TorchScript at opset 12 computes attention masks and embeddings in fp32, among others.
    assert precisions[case.precision] >= 0.75 * sum(precisions.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_export_in_conf_is_parsed_and_built(
    tiny_weights: Path, tmp_path: Path, option: str, component: str, precision: str
) -> None:
    params = composed(tmp_path, f"export={option}")
    (export,) = sections_from_config(params, ["export"]).values()
    if precision == "bf16" and export.opset < BF16_OPSET:
        if option != "dynamo":
            pytest.skip(f"ONNX has no bf16 convolutions at opset {export.opset}")
        # The one exporter that is current, at the first opset that has them.
        export = Export(export.exporter, BF16_OPSET, export.patches, export.dynamic)
    (tmp_path / "graph").mkdir()
    check(Case(export, component, precision), tiny_weights, tmp_path / "graph")


def test_the_precisions_of_the_fleets_are_those_above(tmp_path: Path) -> None:
    for fleet in FLEETS:
        folder = tmp_path / fleet
        folder.mkdir()
        exports = composed(folder, f"fleet={fleet}")["exports"].values()
        assert {item["precision"] for item in exports} <= {"fp32", "fp16", "bf16"}


@pytest.mark.full
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    ("exporter", "opset"),
    [(name, opset) for name, table in OPSETS_WITH_EXPLICIT_ATTENTION.items() for opset in table],
)
def test_every_opset_is_parsed_and_built(
    tiny_weights: Path, tmp_path: Path, exporter: str, opset: int, component: str
) -> None:
    patches = [] if opset in OPSETS[exporter] else ["explicit_attention"]
    export = Export(exporter, opset, patches, STATIC)  # type: ignore[arg-type]
    for precision in ("fp32", "fp16", *(["bf16"] if opset >= BF16_OPSET else [])):
        (tmp_path / precision).mkdir()
        check(Case(export, component, precision), tiny_weights, tmp_path / precision)
