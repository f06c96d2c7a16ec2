"""Lower precisions in the pipeline: what is made, and what a changed setting makes again."""

from __future__ import annotations

import json

import pytest

from diffusion_engines.layout import Workspace
from diffusion_engines.parity.results import read_quantization
from diffusion_engines.precisions import PRECISIONS
from tests.composition import composed
from tests.tiers import long

from .conftest import Clone

pytestmark = pytest.mark.pipeline


@pytest.fixture
def quantized(clone: Clone) -> Clone:
    """A clone whose fleet also has the UNet in 8 bits, on targets of their own."""
    for name in ("fp8", "int8"):
        clone.add_target(name, "rtx40", name)
    return clone


@long
def test_quantized_graphs_and_engines_are_made_from_what_is_there(quantized: Clone) -> None:
    outcome = quantized.repro()

    made = {f"{stage}@{name}-unet" for stage in ("build", "wrap") for name in ("fp8", "int8")}
    made |= {"pack@fp8", "pack@int8"}
    graphs = {"quantize@unet-fp8", "quantize@unet-int8"}
    assert outcome.built == {"check_conf", "report"} | graphs | made
    for name in ("fp8", "int8"):
        bundle = quantized.path / f"artifacts/bundles/{name}/unet"
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert manifest["precision"] == name
        assert manifest["dtypes"][name] > 50
        assert manifest["onnx"]["quantization"]["source"] == "unet-fp16"
        assert [value["dtype"] for value in manifest["inputs"]] == ["float16", "float32", "float16"]
        metrics = quantized.path / f"artifacts/metrics/quantize/unet-{name}.json"
        found = json.loads(metrics.read_text())
        assert 0 < found["source_rel_l2"] < 0.01 < found["rel_l2"] < 0.5
    page = (quantized.path / "artifacts/report/index.html").read_text()
    assert "What the lower precisions cost" in page
    assert not list((quantized.path / "artifacts/.tmp").glob("*unet*"))

    quantized.compose("quantize.int8.calls=2")
    changed = quantized.repro()
    assert changed.built == {
        "check_conf",
        "quantize@unet-int8",
        "build@int8-unet",
        "wrap@int8-unet",
        "report",
    }

    quantized.compose()
    back = quantized.repro()
    assert back.built == set()
    assert {"quantize@unet-int8", "build@int8-unet"} <= back.restored


def test_a_graph_that_costs_too_much_fails_after_it_was_measured(quantized: Clone) -> None:
    quantized.compose("quantize.fp8.rel_l2=1e-9", "quantize.fp8.calls=1")
    outcome = quantized.repro("quantize@unet-fp8", check=False)
    assert outcome.status != 0
    assert "unet-fp8 misses its tolerance at 4 of 4 calls" in outcome.output
    assert "quantize.fp8.kept" in outcome.output
    found = read_quantization(Workspace(quantized.path).quantization("unet-fp8"))
    assert found.parity.worst()["rel_l2"] > 1e-9
    assert len(found.misses) == 4


def test_the_fleet_of_precisions_has_every_component_in_every_precision() -> None:
    engines = composed("fleet=precisions")["engines"].values()
    assert {(e["component"], e["precision"]) for e in engines} == {
        (component, precision)
        for component in ("text_encoder", "unet", "vae_decoder")
        for precision in PRECISIONS
    }
