"""Settings that would only fail hours into a build are refused before it starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from diffusion_engines.config import params_from_config
from diffusion_engines.errors import ConfigError
from diffusion_engines.fleet import OPSETS, OPSETS_WITH_EXPLICIT_ATTENTION, check_fleet
from tests.conftest import ROOT


@pytest.fixture
def params() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))


def problems(params: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        check_fleet(params_from_config(params))
    return str(raised.value)


@pytest.mark.parametrize("opset", range(10, 27))
@pytest.mark.parametrize("patches", [[], ["explicit_attention"]])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_every_opset_is_allowed_or_refused_with_those_that_are(
    params: dict[str, Any], exporter: str, patches: list[str], opset: int
) -> None:
    params["export"] |= {"exporter": exporter, "opset": opset, "patches": patches}
    table = OPSETS_WITH_EXPLICIT_ATTENTION if patches else OPSETS
    if opset in table[exporter]:
        check_fleet(params_from_config(params))
        return
    found = problems(params)
    assert f"the {exporter} exporter lacks opset {opset}" in found
    assert f"expected {table[exporter].start} to {table[exporter].stop - 1}" in found


def test_bf16_convolutions_need_an_opset_that_has_them(params: dict[str, Any]) -> None:
    item = {"component": "unet", "weights": "unet", "precision": "bf16"}
    params["exports"]["unet-bf16"] = item
    assert "exports.unet-bf16.precision: ONNX has bf16 convolutions from opset 22" in problems(
        params
    )
    params["export"]["opset"] = 22
    check_fleet(params_from_config(params))


def test_a_precision_that_simplification_has_no_tolerance_for_is_refused(
    params: dict[str, Any],
) -> None:
    del params["simplify"]["rel_l2"]["fp16"]
    assert "simplify.rel_l2.fp16: missing (conf/simplify/)" in problems(params)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"precision": "fp8"}, "quantized.unet-int8: expected the key unet-fp8"),
        ({"source": "bf16"}, "quantized.unet-int8.source: int8 is made from fp16 or fp32, found"),
        ({"component": "vae_decoder"}, "expected the key vae_decoder-int8"),
        ({"source": "fp32", "component": "unet"}, "needs exports.unet-fp32, which the fleet"),
        (
            {"precision": "fp16-mixed", "source": "fp16"},
            "fp16-mixed is made from fp32, found fp16",
        ),
    ],
)
def test_a_quantized_export_must_be_made_from_one_that_there_is(
    params: dict[str, Any], change: dict[str, str], expected: str
) -> None:
    item = {"component": "unet", "precision": "int8", "source": "fp16"}
    params["quantized"]["unet-int8"] = item
    check_fleet(params_from_config(params))
    del params["exports"]["unet-fp32"], params["engines"]["cpu-unet"]
    item |= change
    assert expected in problems(params)


def test_an_engine_in_8_bits_needs_the_quantized_graph(params: dict[str, Any]) -> None:
    params["engines"]["rtx-unet"]["precision"] = "fp8"
    assert "engines.rtx-unet: needs quantized.unet-fp8, which the fleet" in problems(params)
    item = {"component": "unet", "precision": "fp8", "source": "fp16"}
    params["quantized"]["unet-fp8"] = item
    check_fleet(params_from_config(params))


def test_what_is_kept_in_high_precision_must_be_regular_expressions(
    params: dict[str, Any],
) -> None:
    item = {"component": "unet", "precision": "int8", "source": "fp16"}
    params["quantized"]["unet-int8"] = item
    params["quantize"]["int8"]["kept"]["unet"] = ["conv_in", "(conv"]
    assert "quantize.int8.kept.unet: '(conv' is no regular expression" in problems(params)


def test_all_problems_are_listed_at_once(params: dict[str, Any]) -> None:
    params["export"]["opset"] = 3
    params["measure"]["a10"] = {}
    params["engines"]["cpu-unet"]["precision"] = "bf16"
    found = problems(params)
    for text in (
        "lacks opset 3",
        "measure.a10",
        "has fp32, fp16, fp16-mixed, fp8, int8, not bf16",
        "`make params`",
    ):
        assert text in found
