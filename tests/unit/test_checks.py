"""Settings that would only fail hours into a build are refused before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_engines import checks
from diffusion_engines.checks import check_params
from diffusion_engines.config import params_from_config
from diffusion_engines.errors import ConfigError
from diffusion_engines.families.base import SCHEDULER_CONFIG
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.files import read_json
from diffusion_engines.runtime.sampling import make_scheduler
from tests.composition import ROOT, composed, derived
from tests.tiers import long_but


@pytest.fixture
def params() -> dict[str, Any]:
    return composed()


def change(params: dict[str, Any], key: str, value: object) -> None:
    *folders, name = key.split(".")
    for folder in folders:
        params = params[folder]
    assert name in params
    params[name] = value


def check(params: dict[str, Any]) -> None:
    check_params(params_from_config(params), ROOT)


def problems(params: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        check(params)
    return str(raised.value)


# Each was exported and built: tests/builds/test_conversion.py.
@pytest.mark.parametrize(
    ("exporter", "patches", "first", "last"),
    [
        ("dynamo", [], 17, 24),
        ("dynamo", ["explicit_attention"], 17, 24),
        ("torchscript", [], 14, 23),
        ("torchscript", ["explicit_attention"], 12, 23),
    ],
)
def test_an_opset_that_an_exporter_lacks_is_refused_with_those_that_it_has(
    params: dict[str, Any], exporter: str, patches: list[str], first: int, last: int
) -> None:
    params["export"] |= {"exporter": exporter, "patches": patches}
    for opset in (first, last):
        params["export"]["opset"] = opset
        check(params)
    for opset in (first - 1, last + 1):
        params["export"]["opset"] = opset
        found = problems(params)
        assert f"the {exporter} exporter lacks opset {opset}" in found
        assert f"expected {first} to {last}" in found


def test_bf16_convolutions_need_an_opset_that_has_them(params: dict[str, Any]) -> None:
    params["fleet"]["rtx"]["precision"] = "bf16"
    params = derived(params)
    assert "export.opset: ONNX has bf16 convolutions from opset 22 on, found 18" in problems(params)
    params["export"]["opset"] = 22
    check(params)


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        ("simplify", ("rel_l2", "fp16"), "simplify.rel_l2.fp16: missing (conf/simplify/)"),
        ("validate", ("components", "unet", "fp16"), "validate.components.unet.fp16: missing"),
        ("validate", ("components", "unet"), "validate.components.unet.fp32: missing"),
        ("validate", ("latents", "fp32"), "validate.latents.fp32: missing (conf/validate/)"),
        ("validate", ("images", "fp32"), "validate.images.fp32: missing (conf/validate/)"),
    ],
)
def test_what_will_be_compared_has_a_tolerance(
    params: dict[str, Any], section: str, keys: tuple[str, ...], expected: str
) -> None:
    *path, last = keys
    value = params[section]
    for key in path:
        value = value[key]
    del value[last]
    assert expected in problems(params)


def test_a_tolerance_that_nothing_is_compared_with_may_be_missing(params: dict[str, Any]) -> None:
    del params["validate"]["components"]["unet"]["fp8"]
    check(params)


@pytest.mark.parametrize(
    ("precision", "source", "expected"),
    [
        ("int8", "bf16", "quantize.int8.source: int8 is made from fp16 or fp32, found bf16"),
        ("fp16-mixed", "fp16", "quantize.fp16-mixed.source: fp16-mixed is made from fp32, found"),
    ],
)
def test_a_quantized_graph_is_made_from_one_that_can_be_quantized(
    params: dict[str, Any], precision: str, source: str, expected: str
) -> None:
    params["fleet"]["cpu"]["components"]["unet"] = precision
    check(derived(params))
    params["quantize"][precision]["source"] = source
    assert expected in problems(derived(params))


def test_what_is_kept_in_high_precision_must_be_regular_expressions(
    params: dict[str, Any],
) -> None:
    params["fleet"]["cpu"]["components"]["unet"] = "int8"
    params["quantize"]["int8"]["kept"]["unet"] = ["conv_in", "(conv"]
    found = problems(derived(params))
    assert "quantize.int8.kept.unet: '(conv' is no regular expression" in found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"revision": None}, "model.revision: expected the full hash of a commit"),
        ({"revision": "main"}, "40 hexadecimal digits, so that every machine downloads the same"),
        ({"revision": "133a221"}, "found 133a221 (conf/model/)"),
        ({"repo": None}, "model.repo: the hub needs one"),
    ],
)
def test_weights_from_the_hub_are_those_of_one_commit(
    change: dict[str, Any], expected: str
) -> None:
    params = composed("model=sd14", "fleet=rtx40")
    check(params)
    params["model"] |= change
    assert expected in problems(params)
    params["model"]["source"] = "synthetic"  # needs neither
    check(params)


def test_a_baseline_has_a_name_of_its_own(params: dict[str, Any]) -> None:
    params["benchmark"]["baselines"] = {"engines": params["benchmark"]["baselines"]["pytorch"]}
    assert "benchmark.baselines.engines: the name is taken" in problems(params)


def test_a_patch_that_does_not_exist_is_refused(params: dict[str, Any]) -> None:
    params["export"]["patches"] = ["explicit_attention", "magic"]
    found = problems(params)
    assert "export.patches: no such patch: magic; expected any of expand_for_broadcast_to" in found


def test_an_image_is_a_whole_number_of_latents(params: dict[str, Any]) -> None:
    params["image"] |= {"vae_scale_factor": 16, "height": 136}
    assert "image.height: expected a multiple of image.vae_scale_factor 16" in problems(params)


def test_an_alternative_to_an_alternative_is_refused() -> None:
    params = composed("fleet=cpu_backends", "fleet.cpu.alternative_to=cpu_inductor")
    assert (
        "fleet.cpu.alternative_to: cpu_inductor is an alternative itself, to cpu; name that one"
    ) in problems(params)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p["fleet"].pop("rtx"), "fleet.rtx: missing, so nothing is built for"),
        (lambda p: p["fleet"].update(a10=p["fleet"]["rtx"]), "fleet.a10: no target a10; there are"),
        (
            lambda p: p["fleet"]["rtx"].update(only=["transformer"]),
            "fleet.rtx.only: the model lemon has no transformer; as a StableDiffusionPipeline it "
            "has text_encoder, unet, vae_decoder, encoder, denoiser, decoder",
        ),
        (
            lambda p: p["fleet"]["rtx"].update(alternative_to="a10"),
            "fleet.rtx.alternative_to: expected another target of the fleet (cpu), found a10",
        ),
        (
            lambda p: p["fleet"]["cpu"].update(alternative_to="cpu"),
            "fleet.cpu.alternative_to: expected another target of the fleet (rtx), found cpu",
        ),
        (
            lambda p: p["fleet"]["rtx"].update(alternative_to="cpu"),
            "alternatives are for the same hardware; rtx is for cuda, cpu for cpu",
        ),
        (lambda p: p["measure"].append("a10"), "measure: no engine is built for the target a10"),
        (
            lambda p: p["fleet"]["cpu"].update(precision="bf16"),
            "fleet.cpu: the backend onnxruntime has fp32, fp16, fp16-mixed, fp8, int8, not bf16",
        ),
    ],
)
def test_a_fleet_names_what_there_is(
    params: dict[str, Any], change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    change(params)
    assert expected in problems(derived(params))


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
    check(params)
    params["model"]["loras"][0] = {"file": file, "weight": weight}
    found = problems(params)
    assert expected in found
    assert "(conf/lora/)" in found


def test_a_checkpoint_in_one_file_is_safetensors(params: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "photo.safetensors"
    params["model"] |= {"source": "file", "checkpoint": str(path)}
    assert f"model.checkpoint: no such file, found {path}" in problems(params)
    path.touch()
    check(params)
    params["model"]["checkpoint"] = str(path.with_suffix(".ckpt"))
    assert "needs the path of a .safetensors file" in problems(params)


def test_embeddings_are_files_that_dvc_watches_and_words_of_their_own(
    params: dict[str, Any],
) -> None:
    good = {"file": "a.safetensors", "word": "<a>"}
    params["model"]["embeddings"] = [good, {"file": "b.safetensors", "word": "<b>"}]
    check(params)
    params["model"]["embeddings"] = [good, {"file": "../b.pt", "word": "<a>"}]
    found = problems(params)
    for text in ("1.file: only safetensors", "1.file: expected a path below", "for the word <a>"):
        assert f"model.embeddings.{text}" in found or f"two files {text}" in found


def test_sdxl_takes_an_earlier_hidden_state_already() -> None:
    params = composed("model=sdxl", "fleet=sdxl", "model.clip_skip=1")
    assert "model.clip_skip: a StableDiffusionXLPipeline takes an earlier" in problems(params)


def test_all_problems_are_listed_at_once(params: dict[str, Any]) -> None:
    params["export"]["opset"] = 3
    params["measure"].append("a10")
    params["fleet"]["cpu"]["precision"] = "bf16"
    found = problems(derived(params))
    for text in ("lacks opset 3", "measure: no engine", "not bf16", "`make params`"):
        assert text in found


def test_loras_come_from_the_command_line_a_file_or_the_model(tmp_path: Path) -> None:
    lora = {"file": "watercolour.safetensors", "weight": 0.8}
    given = "model.loras=[{file: watercolour.safetensors, weight: 0.8}]"
    assert composed()["model"]["loras"] == []
    assert composed(given)["model"]["loras"] == [lora]
    assert composed(given, "model=tiny")["model"]["loras"] == [lora]
    assert composed(given, "model.loras.0.weight=0.3")["model"]["loras"] == [lora | {"weight": 0.3}]
    ink = composed("lora=ink")
    assert ink["model"]["loras"] == [{"file": "ink.safetensors", "weight": 1.0}]
    assert ink["model"]["lora_folder"] == "loras"
    check(ink)
    # A model's own file may name some as well.
    conf = Path(shutil.copytree(ROOT / "conf", tmp_path / "conf"))
    (conf / "model/inked.yaml").write_text(
        "# @package _global_\n# The two.\ndefaults: [tiny, _self_]\n"
        "model: {loras: [{file: ink.safetensors, weight: 1}]}\n"
    )
    inked = composed("model=inked", conf=conf)
    assert inked["model"]["loras"] == [{"file": "ink.safetensors", "weight": 1}]


FLEETS = sorted(path.stem for path in (ROOT / "conf/fleet").glob("*.yaml"))
MODELS = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml"))


@pytest.mark.parametrize(
    ("fleet", "model"),
    long_but(
        {*product(FLEETS, ["tiny"]), *product(["default", "sdxl"], MODELS)},
        product(FLEETS, MODELS),
    ),
)
def test_any_model_goes_with_any_fleet(fleet: str, model: str) -> None:
    # The article's own settings have guidance, which one model is built without.
    settings = ["benchmark=few_steps"] if model == "sdxl-turbo" else []
    settings += ["reference=few_steps"] if (fleet, model) == ("article", "sdxl-turbo") else []
    params = composed(f"fleet={fleet}", f"model={model}", *settings)
    check(params)
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


def test_a_folder_without_a_pipeline_is_refused(params: dict[str, Any], tmp_path: Path) -> None:
    params["model"]["folder"] = str(tmp_path)
    assert f"model.folder: {tmp_path} is no diffusers model folder" in problems(params)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "whose pipeline no engines are built for; found FluxPipeline" in problems(params)


def test_a_model_without_guidance_is_not_asked_for_it() -> None:
    params = composed("fleet=sdxl", "model=sdxl-turbo")
    check(params)
    assert params["reference"]["steps"] == params["generate"]["steps"] == 4
    params["generate"]["guidance_scale"] = 7.5
    assert "generate.guidance_scale: the model sdxl-turbo is built without guidance" in problems(
        params
    )


def test_a_scheduler_that_the_family_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = replace(FAMILY, schedulers={"lms": FAMILY.schedulers["lms"]})
    monkeypatch.setattr(checks, "family_of", lambda folder: flow)
    found = problems(composed("benchmark.scheduler=lms", "reference.scheduler=lms"))
    said = "generate.scheduler: a StableDiffusionPipeline has lms, found dpmpp_2m (conf/generate/)"
    assert said in found
    assert "benchmark.scheduler" not in found


def test_the_article_is_composed_as_it_was_written() -> None:
    params = composed("fleet=article")
    assert params["model"]["name"] == "sd14"
    assert (params["export"]["exporter"], params["export"]["opset"]) == ("torchscript", 12)
    assert list(params["engines"]) == ["a10-unet"]
    assert params["targets"]["a10"]["wrap"] == ["torchscript"]
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
            "wrap": [],
            "build": {
                "max_aux_streams": None,
                "tiling_optimization_level": "none",
                "profiling_verbosity": "none",
                "tf32": False,
            },
        }

    return change


def old_gpu_in_bf16(params: dict[str, Any]) -> None:
    params["targets"]["a10"] |= {"gpu": "T4", "compute_capability": "7.5"}
    params["fleet"]["a10"]["precision"] = "bf16"
    params["export"]["opset"] = 22


def stripped_in_8_bits(params: dict[str, Any]) -> None:
    a10(weights="stripped", wrap=[])(params)
    params["fleet"]["a10"]["precision"] = "int8"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rtx_on("9.0"), "TensorRT-RTX does not run on 9.0, expected 7.5, 8.0, 8.6, 8.9, 12.0"),
        (rtx_on("10.0"), "need the backend tensorrt"),
        (a10(compute_capability="8.0"), "an A10 has 8.6, found 8.0"),
        (a10(gpu="T4", compute_capability="7.5", hardware_compatibility="ampere_plus"), "has 7.5"),
        (a10(exclude_lean_runtime=True), "build.exclude_lean_runtime: only a plan with"),
        (a10(weights="stripped"), "targets.a10.wrap: a file for PyTorch has no way"),
        (a10(weights="stripped", wrap=[], version_compatible=True), "the lean runtime of a"),
        (stripped_in_8_bits, "targets.a10.build.weights: int8 is calibrated on the weights"),
        (a10(hardware_compatibility="ampere_plus"), "torchtrtc ties its file to the GPU"),
        (a10(version_compatible=True), "torch-tensorrt does not let a plan run the runtime"),
        (old_gpu_in_bf16, "bf16 needs compute capability 8.0 or later, "),
    ],
)
def test_what_no_gpu_can_do_is_refused_before_it_starts(
    change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    params = composed("fleet=article")
    change(params)
    assert expected in problems(derived(params))


@pytest.mark.parametrize(
    "change",
    [
        a10(weights="stripped", wrap=[]),
        a10(weights="refittable"),
        a10(version_compatible=True, exclude_lean_runtime=True),
        a10(version_compatible=True, wrap=[]),
        a10(hardware_compatibility="ampere_plus", wrap=["exported_program"]),
        rtx_on("8.6"),
    ],
)
def test_what_a_gpu_can_do_is_allowed(change: Callable[[dict[str, Any]], None]) -> None:
    params = composed("fleet=article")
    change(params)
    check(derived(params))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("reference.seed", -1, "reference.seed: "),
        ("reference.seed", 2**63, "reference.seed: "),
        ("benchmark.seed", -1, "benchmark.seed: "),
        ("model.seed", 2**64, "model.seed: "),
        ("generate.seed", 2**63, "generate.seed: "),
        ("generate.guidance_scale", float("inf"), "generate.guidance_scale: "),
        ("model.lora_folder", "no where", "`mkdir -p 'no where'` (conf/lora/)"),
        ("validate.scorers", "nowhere", "validate.scorers: no such folder, found nowhere"),
    ],
)
def test_a_value_that_nothing_could_be_made_with_is_refused(
    params: dict[str, Any], key: str, value: object, expected: str
) -> None:
    change(params, key, value)
    assert expected in problems(params)


# Of the default model, whose config skips no Runge-Kutta steps and has 1000 steps of training.
@pytest.mark.parametrize(
    ("scheduler", "first", "last"),
    [("pndm", 4, 999), ("lcm", 1, 50), ("ddim", 1, 999), ("euler", 1, 999)],
)
def test_steps_that_a_scheduler_does_not_take_are_refused(
    params: dict[str, Any], scheduler: str, first: int, last: int
) -> None:
    change(params, "generate.scheduler", scheduler)
    for steps in (first, last):
        change(params, "generate.steps", steps)
        check(params)
        scheduled(scheduler, steps)
    for steps in {first - 1, last + 1} - {0}:
        change(params, "generate.steps", steps)
        found = problems(params)
        assert f"generate.steps: {scheduler}: " in found
        assert f"takes {first} to {last} with this model, found {steps}" in found
        if scheduler != "euler":  # which goes between the steps of the training
            with pytest.raises((ValueError, IndexError)):
                scheduled(scheduler, steps)


def scheduled(name: str, steps: int) -> None:
    """Run diffusers' scheduler of the default model over so many steps."""
    config = read_json(ROOT / "models/lemon" / SCHEDULER_CONFIG)
    scheduler = make_scheduler(FAMILY, name, config)
    scheduler.set_timesteps(steps)
    sample = torch.zeros(1, 1, 1, 1)
    for timestep in scheduler.timesteps[:20]:
        sample = scheduler.step(sample, timestep, sample).prev_sample
