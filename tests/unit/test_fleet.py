"""Settings that would only fail hours into a build are refused before it starts."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_engines.compose import compose_params
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
    params["targets"]["rtx"]["compute_capabilities"] = ["8.9"]
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


@pytest.mark.parametrize(
    ("file", "weight", "expected"),
    [
        ("a.safetensors", 0.0, "model.loras.0.weight: 0 changes nothing; for a run without a.saf"),
        ("a.ckpt", 1.0, "model.loras.0.file: only safetensors are read, pickles can run code"),
        ("/home/a.safetensors", 1.0, "model.loras.0.file: expected a path below model.lora_folder"),
        ("../a.safetensors", 1.0, "below model.lora_folder (loras), which DVC watches; found ../a"),
        ("./b.safetensors", 1.0, "model.loras.1.file: b.safetensors is listed twice"),
    ],
)
def test_a_lora_must_be_one_that_dvc_watches_and_that_changes_something(
    params: dict[str, Any], file: str, weight: float, expected: str
) -> None:
    second = {"file": "b.safetensors", "weight": -0.5}
    params["model"]["loras"] = [{"file": "sub/a.safetensors", "weight": 1}, second]
    check_fleet(params_from_config(params))
    params["model"]["loras"][0] = {"file": file, "weight": weight}
    found = problems(params)
    assert expected in found
    assert "(conf/lora/)" in found


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


def composed(folder: Path, *overrides: str) -> dict[str, Any]:
    for name in ("conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__py*"))
    compose_params([*overrides], folder)
    return yaml.safe_load((folder / "params.yaml").read_text())


def test_loras_come_from_the_command_line_a_file_or_the_model(tmp_path: Path) -> None:
    lora = {"file": "watercolour.safetensors", "weight": 0.8}
    given = "model.loras=[{file: watercolour.safetensors, weight: 0.8}]"
    assert composed(tmp_path / "a")["model"]["loras"] == []
    assert composed(tmp_path / "b", given)["model"]["loras"] == [lora]
    assert composed(tmp_path / "c", given, "model=tiny")["model"]["loras"] == [lora]
    assert composed(tmp_path / "d", given, "model.loras.0.weight=0.3")["model"]["loras"] == [
        lora | {"weight": 0.3}
    ]
    text = (tmp_path / "a/conf/lora/none.yaml").read_text()
    kept = text.replace("loras: []", "loras: [{file: ink.safetensors, weight: 1}]")
    (tmp_path / "a/conf/lora/ink.yaml").write_text(kept)
    compose_params(["lora=ink"], tmp_path / "a")
    params = yaml.safe_load((tmp_path / "a/params.yaml").read_text())
    assert params["model"]["loras"] == [{"file": "ink.safetensors", "weight": 1}]
    assert params["model"]["lora_folder"] == "loras"
    check_fleet(params_from_config(params))
    # A model's own file may name some as well.
    (tmp_path / "b/conf/model/inked.yaml").write_text(
        "# @package _global_\n# The two.\ndefaults: [tiny, _self_]\n"
        "model: {loras: [{file: ink.safetensors, weight: 1}]}\n"
    )
    compose_params(["model=inked"], tmp_path / "b")
    params = yaml.safe_load((tmp_path / "b/params.yaml").read_text())
    assert params["model"]["loras"] == [{"file": "ink.safetensors", "weight": 1}]


FLEETS = sorted(path.stem for path in (ROOT / "conf/fleet").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml"))
FITTING = [
    (fleet, model)
    for fleet in FLEETS
    for model in MODELS
    # One has a second text encoder, the other times its own model at a guidance of 7.5.
    if ("sdxl" not in fleet or "sdxl" in model) and (fleet, model) != ("article", "sdxl-turbo")
]


@pytest.mark.parametrize(("fleet", "model"), FITTING)
def test_every_fleet_composes_with_every_model(tmp_path: Path, fleet: str, model: str) -> None:
    params = composed(tmp_path, f"fleet={fleet}", f"model={model}")
    check_fleet(params_from_config(params))
    assert params["model"]["name"] == model
    # What one fleet builds for a target, another does not change.
    built = {engine["target"] for engine in params["engines"].values()}
    assert built == set(params["targets"])
    kept = {
        key
        for key, target in params["targets"].items()
        if target["backend"] == "tensorrt" and target["build"]["timing_cache"]
    }
    assert set(params["timing"]) == kept


def test_a_component_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    found = problems(composed(tmp_path, "fleet=sdxl", "model=sd15"))
    for key in ("exports.text_encoder_2-fp16", "engines.rtx40-text_encoder_2"):
        assert f"{key}: the model sd15 has no text_encoder_2; as a StableDiffusionPipeline" in found
    assert "it has text_encoder, unet, vae_decoder (conf/fleet/)" in found


def test_a_folder_without_a_pipeline_is_refused(params: dict[str, Any], tmp_path: Path) -> None:
    params["model"]["folder"] = str(tmp_path)
    assert f"model.folder: {tmp_path} is no diffusers model folder" in problems(params)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "whose pipeline no engines are built for; found FluxPipeline" in problems(params)


def test_a_model_without_guidance_is_not_asked_for_it(tmp_path: Path) -> None:
    params = composed(tmp_path, "fleet=sdxl", "model=sdxl-turbo")
    check_fleet(params_from_config(params))
    assert params["reference"]["steps"] == params["generate"]["steps"] == 4
    params["generate"]["guidance_scale"] = 7.5
    assert "generate.guidance_scale: the model sdxl-turbo is built without guidance" in problems(
        params
    )


def test_the_article_is_composed_as_it_was_written(tmp_path: Path) -> None:
    params = composed(tmp_path, "fleet=article")
    assert params["model"]["name"] == "sd14"
    assert (params["export"]["exporter"], params["export"]["opset"]) == ("torchscript", 12)
    assert list(params["engines"]) == ["a10-unet"]
    assert params["targets"]["a10"]["torchscript"] is True
    benchmark = params["benchmark"]
    assert (benchmark["scheduler"], benchmark["steps"], benchmark["guidance_scale"]) == (
        "lms",
        100,
        7.5,
    )
    # Speedups are over the first: the article's script.
    assert list(benchmark["baselines"]) == ["pytorch", "fp16", "compiled"]
    assert benchmark["baselines"]["pytorch"]["autocast"] is True


def a10(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(params: dict[str, Any]) -> None:
        target = params["targets"]["a10"]
        target |= {key: value for key, value in changes.items() if key in target}
        target["build"] |= {key: value for key, value in changes.items() if key in target["build"]}

    return change


def rtx_on(capability: str) -> Callable[[dict[str, Any]], None]:
    def change(params: dict[str, Any]) -> None:
        params["targets"]["a10"] = {
            "backend": "tensorrt_rtx",
            "compute_capabilities": [capability],
            "torchscript": False,
            "build": {
                "max_aux_streams": None,
                "tiling_optimization_level": "none",
                "profiling_verbosity": "none",
                "tf32": False,
            },
        }
        params["engines"]["a10-unet"]["backend"] = "tensorrt_rtx"
        params["timing"] = {}

    return change


def old_gpu_in_bf16(params: dict[str, Any]) -> None:
    params["targets"]["a10"] |= {"gpu": "T4", "compute_capability": "7.5"}
    params["engines"]["a10-unet"]["precision"] = "bf16"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rtx_on("9.0"), "TensorRT-RTX does not run on 9.0, expected 7.5, 8.0, 8.6, 8.9, 12.0"),
        (rtx_on("10.0"), "need the backend tensorrt"),
        (a10(compute_capability="8.0"), "an A10 has 8.6, found 8.0"),
        (a10(gpu="T4", compute_capability="7.5", hardware_compatibility="ampere_plus"), "has 7.5"),
        (a10(exclude_lean_runtime=True), "build.exclude_lean_runtime: only a plan with"),
        (a10(weights="stripped"), "targets.a10.torchscript: a TorchScript file has no way"),
        (a10(version_compatible=True), "torch-tensorrt does not let a plan run the runtime"),
        (a10(timing_cache=False), "timing.a10: expected a target with engines"),
        (lambda p: p["timing"].update(h100={}), "timing.h100: expected a target with engines"),
        (
            old_gpu_in_bf16,
            "targets.a10.compute_capability: bf16 needs compute capability 8.0 or later, found 7.5",
        ),
    ],
)
def test_what_no_gpu_can_do_is_refused_before_it_starts(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    params = composed(tmp_path, "fleet=article")
    change(params)
    assert expected in problems(params)


@pytest.mark.parametrize(
    "change",
    [
        a10(weights="stripped", torchscript=False),
        a10(weights="refittable"),
        a10(version_compatible=True, exclude_lean_runtime=True),
        a10(version_compatible=True, torchscript=False),
        a10(hardware_compatibility="ampere_plus"),
        rtx_on("8.6"),
    ],
)
def test_what_a_gpu_can_do_is_allowed(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    params = composed(tmp_path, "fleet=article")
    change(params)
    check_fleet(params_from_config(params))
