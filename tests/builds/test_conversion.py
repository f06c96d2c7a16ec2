"""Every way of exporting in conf/ gives graphs that TensorRT's parser takes and its builder builds.

TensorRT-RTX does it here, on a CPU, with the parser that TensorRT has too. The same at full size:
tests/full/test_sd14.py.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from diffusion_engines.checks import OPSETS, OPSETS_WITH_EXPLICIT_ATTENTION
from diffusion_engines.config import Export
from diffusion_engines.onnx.graph import MODEL
from diffusion_engines.onnx.operators import graph_statistics
from tests.composition import composed
from tests.conftest import COMPONENTS, ROOT, STATIC
from tests.conversion import BF16_OPSET, OPTIONS, PRECISIONS, Case, case_of_conf, check_conversion
from tests.tiers import long_but

FLEETS = sorted(path.stem for path in (ROOT / "conf/fleet").glob("*.yaml"))
# Every option, every component and every precision at least once, and what is refused.
QUICK = [
    ("article", "unet", "fp16"),
    ("dynamic", "vae_decoder", "fp16"),
    ("dynamo", "text_encoder", "fp32"),
    ("dynamo", "unet", "fp16"),
    ("dynamo", "vae_decoder", "bf16"),
    ("torchscript", "text_encoder", "fp16"),
    ("torchscript", "vae_decoder", "fp32"),
]


@pytest.mark.parametrize(
    ("option", "component", "precision"),
    long_but(QUICK, product(OPTIONS, COMPONENTS, PRECISIONS)),
)
def test_every_export_in_conf_is_parsed_and_built(
    tiny_weights: Path, tmp_path: Path, option: str, component: str, precision: str
) -> None:
    case = case_of_conf(option, component, precision)
    check_conversion(case, tiny_weights, tmp_path)


def test_the_precisions_of_the_fleets_are_those_above() -> None:
    for fleet in FLEETS:
        exports = composed(f"fleet={fleet}")["exports"].values()
        assert {item["precision"] for item in exports} <= {*PRECISIONS}


def test_an_attention_operator_with_a_mask_is_built(tiny_weights: Path, tmp_path: Path) -> None:
    """Operators since opset 23; TensorRT has no one kernel for those of text encoders."""
    case = Case(Export("dynamo", 23, [], STATIC), "text_encoder", "fp32")
    check_conversion(case, tiny_weights, tmp_path)
    operators = graph_statistics(tmp_path / MODEL).operators
    assert operators["Attention"] == 2  # a layer each


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
        case = Case(export, component, precision)
        check_conversion(case, tiny_weights, tmp_path / precision)
