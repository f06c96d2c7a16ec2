"""Each model of conf/model/, at reduced width, from export to images that are diffusers' own."""

from __future__ import annotations

import functools
import json
import unittest.mock
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from diffusion_engines import load_pipeline
from diffusion_engines.backends import backend
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from diffusion_engines.backends.tensorrt_rtx.settings import TensorRTRTXBuild, TensorRTRTXTarget
from diffusion_engines.config import (
    Image,
    params_from_config,
)
from diffusion_engines.errors import ConfigError, ShapeError
from diffusion_engines.families import family_of, stable_diffusion, stable_diffusion_xl
from diffusion_engines.families.base import outputs_of
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.graph import MODEL, check_graph
from diffusion_engines.onnx.simplify import check_same_results, simplify_graph
from diffusion_engines.parity.gates import gate_of, misses_of_component
from diffusion_engines.parity.metrics import worst_difference
from diffusion_engines.runtime import sampling
from diffusion_engines.runtime.assemble import torch_networks
from diffusion_engines.runtime.calls import recorded_calls
from diffusion_engines.runtime.denoising import denoise
from diffusion_engines.runtime.networks import example_inputs
from diffusion_engines.runtime.recording import record_reference
from diffusion_engines.serve import pipelines
from diffusion_engines.weights.model import check_model
from tests.conftest import ROOT, graph_of, load, write_bundles
from tests.manifests import built_manifest, graph_manifest
from tests.models import (
    MODELS,
    NORMALIZING_VAE,
    TINY_VAE,
    section,
    small_image,
    write_reduced_weights,
)
from tests.tiers import long_but

PROMPT = "A big banana leaf with lemons in front of it"
CPU = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild("all", tf32=False))
ADA = TensorRTRTXTarget("tensorrt_rtx", ["8.9"], TensorRTRTXBuild(None, "none", "none", tf32=False))
# Networks that differ between the models, in the precision that GPUs get; the one with the most
# inputs also in fp32, which would show an error of the conversion alone.
GRAPHS = [
    *(("sd15", component, "fp16") for component in ("text_encoder", "unet")),
    ("sd15-taesd", "vae_decoder", "fp16"),
    *(("sd21", component, "fp16") for component in ("text_encoder", "unet")),
    *(("sdxl", component, "fp16") for component in stable_diffusion_xl.FAMILY.components),
    ("sdxl", "unet", "fp32"),
    ("sdxl-turbo", "unet", "fp16"),
]
QUICK = [
    ("sd21", "text_encoder", "fp16"),
    ("sdxl", "text_encoder_2", "fp16"),
    ("sdxl", "unet", "fp16"),
    ("sdxl", "vae_decoder", "fp16"),
]


@dataclass(frozen=True)
class Reduced:
    """A model at reduced width."""

    name: str
    weights: Path
    image: Image

    @property
    def few_steps(self) -> bool:
        return not self.image.guidance


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reduced]:
    vaes: dict[str, dict[str, Any]] = {"sd15-taesd": TINY_VAE, "sdxl-playground": NORMALIZING_VAE}
    found = {}
    for name in (*MODELS, *vaes):
        model = name if name in MODELS else name.split("-")[0]
        folder = tmp_path_factory.mktemp(name)
        weights = write_reduced_weights(model, folder, vae=vaes.get(name))
        check_model(weights, name=name)
        found[name] = Reduced(name, weights, small_image(model))
    return found


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return params_from_config(yaml.safe_load((ROOT / "params.yaml").read_text()))


@pytest.mark.parametrize(("name", "component", "precision"), long_but(QUICK, GRAPHS))
def test_a_component_is_exported_simplified_built_and_computes_what_pytorch_does(
    reduced: dict[str, Reduced],
    params: dict[str, Any],
    tmp_path: Path,
    name: str,
    component: str,
    precision: str,
) -> None:
    model = reduced[name]
    loaded = load(model.weights, component, precision, image=model.image)
    for folder in ("exported", "simplified", "ort", "rtx"):
        (tmp_path / folder).mkdir()
    export_module(
        loaded.module,
        loaded.inputs,
        tmp_path / "exported",
        precision=precision,
        exporter="dynamo",
        opset=18,
        patches=[],
        outputs=loaded.outputs,
        vocabulary=loaded.vocabulary,
    )
    exported, graph = (tmp_path / folder / MODEL for folder in ("exported", "simplified"))
    simplify_graph(exported, graph.parent, skipped_optimizers=[])
    check_graph(graph, opset=18, writer="onnxsim", outputs=len(loaded.outputs))
    check_same_results(exported, graph, seed=0, allowed=params["simplify"].rel_l2[precision])

    source = graph_of(graph, loaded.inputs, precision, component)
    onnxruntime = backend("onnxruntime")
    result = onnxruntime.build(source, tmp_path / "ort", CPU)
    made = graph_manifest(component, precision, loaded.inputs)
    manifest = built_manifest(f"cpu-{component}", made, CPU, result)
    engine = onnxruntime.load(tmp_path / "ort", manifest, "cpu")
    tensors = example_inputs(loaded.inputs, "fp32", vocabulary=loaded.vocabulary, seed=1)
    reference = load(model.weights, component, "fp32", image=model.image).module
    expected = outputs_of(reference(*tensors))
    found = [value.float() for value in outputs_of(engine(*tensors))]
    difference = worst_difference(found, expected)
    gate = gate_of(params["validate"], component, precision)
    assert misses_of_component(component, gate, [difference]) == []
    if precision == "fp16":
        assert difference.rel_l2 > 1e-5  # it is fp16 that was compared

    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    built = backend("tensorrt_rtx").build(source, tmp_path / "rtx", ADA)
    assert (tmp_path / "rtx" / built.engine).stat().st_size > 50_000
    assert built.precisions[precision] >= 0.75 * sum(built.precisions.values())


def own_pipeline(model: Reduced, scheduler: str) -> Any:
    """Diffusers' pipeline, loaded by diffusers."""
    import diffusers

    family = family_of(model.weights)
    cls = getattr(diffusers, family.class_name)
    options = {} if cls is diffusers.StableDiffusionXLPipeline else {"safety_checker": None}
    pipeline = cls.from_pretrained(model.weights, **options)
    pipeline.scheduler = sampling.make_scheduler(family, scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, model: Reduced, negative: str | None) -> torch.Tensor:
    edge = model.image.height
    return pipeline(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=3,
        guidance_scale=1.0 if model.few_steps else 6.0,
        height=edge,
        width=edge,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images


# v-prediction is the scheduler's matter, so SD 2.1 has every one; the others have their own.
RUNS = [
    ("sd15-taesd", "pndm", ""),
    *(("sd21", scheduler, "blurry") for scheduler in stable_diffusion.FAMILY.schedulers),
    ("sdxl", "euler", None),  # zeros for the negative prompt
    ("sdxl-playground", "dpmpp_2m", "blurry"),
    ("sdxl-turbo", "euler_ancestral", None),
    ("sdxl-turbo", "lcm", None),
]


@pytest.mark.parametrize(("name", "scheduler", "negative"), RUNS)
def test_images_are_those_of_diffusers(
    reduced: dict[str, Reduced], name: str, scheduler: str, negative: str | None
) -> None:
    model = reduced[name]
    expected = paint(own_pipeline(model, scheduler), model, negative)
    assert expected.std() > 0.01  # a picture, not one colour
    found = sample(model, scheduler, negative or "").images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def sample(model: Reduced, scheduler: str, negative: str, **changes: str) -> sampling.Sample:
    loaded = sampling.load_model(model.weights)
    loaded = replace(loaded, scheduler_config={**loaded.scheduler_config, **changes})
    image = model.image
    settings = sampling.Settings(
        scheduler,
        3,
        1.0 if model.few_steps else 6.0,
        image.height,
        image.width,
        negative_prompt=negative,
        guidance=image.guidance,
    )
    noise = sampling.initial_latents(loaded, settings, [3])
    networks = torch_networks("fp32", "cpu", weights=model.weights)
    return sampling.sample(networks, loaded, settings, [PROMPT], noise, seeds=[3])


@pytest.mark.parametrize(
    ("name", "change"),
    [("sd21", {"prediction_type": "epsilon"}), ("sdxl-turbo", {"timestep_spacing": "leading"})],
)
def test_what_the_schedule_of_a_model_says_is_heeded(
    reduced: dict[str, Reduced], name: str, change: dict[str, str]
) -> None:
    model = reduced[name]
    own = sample(model, "euler", "").images
    assert (sample(model, "euler", "", **change).images - own).abs().max() > 1e-3


def test_sdxl_knows_no_negative_prompt_from_an_empty_one(reduced: dict[str, Reduced]) -> None:
    model = reduced["sdxl"]
    zeros = sample(model, "euler", "").images
    empty = paint(own_pipeline(model, "euler"), model, "")
    assert (zeros - empty).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "negative"), [("sd21", "blurry"), ("sdxl", None)])
def test_a_recording_has_every_output_of_every_call(
    reduced: dict[str, Reduced], tmp_path: Path, name: str, negative: str | None
) -> None:
    model = reduced[name]
    networks = torch_networks("fp32", "cpu", weights=model.weights)
    settings = sampling.Settings("euler", 2, 6.0, 64, 64, negative_prompt=negative or "")
    record_reference(
        networks,
        sampling.load_model(model.weights),
        settings,
        [PROMPT],
        tmp_path,
        seed=0,
        batch_size=1,
        frames=2,
    )
    for component, spec in family_of(model.weights).components.items():
        calls = recorded_calls(tmp_path / f"{component}.safetensors")
        # Zeros for the negative prompt take no call.
        count = {"unet": 2, "vae_decoder": 1}.get(component, 2 if negative else 1)
        assert len(calls) == count
        for inputs, outputs in calls:
            assert len(outputs) == len(spec.outputs)
            again = outputs_of(networks[component](*inputs))
            torch.testing.assert_close(again, outputs)


@pytest.mark.parametrize("name", long_but(["sd14"], ["sd14", "sd21", "sdxl"]))
def test_configs_with_nothing_but_what_has_no_default_make_the_same_pictures(
    tmp_path: Path, name: str
) -> None:
    weights = write_reduced_weights(name, tmp_path, sparse=True)
    model = Reduced(name, weights, small_image(name))
    vae = json.loads((weights / "vae/config.json").read_text())
    assert "scaling_factor" not in vae
    assert "time_cond_proj_dim" not in json.loads((weights / "unet/config.json").read_text())
    check_model(weights, name=name)  # as `download` does
    own = own_pipeline(model, "euler")
    expected = paint(own, model, "blurry")
    assert expected.std() > 0.01
    found = sample(model, "euler", "blurry").images  # in PyTorch, as `reference` does
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    served = serve(model, tmp_path / "cpu")
    served.scheduler = own.scheduler
    torch.testing.assert_close(paint(served, model, "blurry"), expected, rtol=0, atol=1e-4)


def serve(model: Reduced, folder: Path) -> Any:
    """Export, build, bundle and load every network."""
    write_bundles(model.weights, folder, image=model.image)
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# With the keys of their published configs, and no others: SD 1.4's lack time_cond_proj_dim.
@pytest.mark.parametrize("name", long_but(["sd21", "sdxl-turbo"], MODELS))
def test_served_engines_paint_what_diffusers_paints(
    reduced: dict[str, Reduced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = reduced[name]
    for component in family_of(model.weights).components.values():
        published = ROOT / section(name, "model")["folder"] / component.folder / "config.json"
        ours = model.weights / component.folder / "config.json"
        assert set(json.loads(ours.read_text())) == set(json.loads(published.read_text()))
    served = serve(model, tmp_path / "cpu")
    own = own_pipeline(model, "euler")
    assert isinstance(served, type(own))
    scheduler = "lcm" if model.few_steps else "euler"
    for pipeline in (served, own):
        config = pipeline.scheduler.config
        family = family_of(model.weights)
        pipeline.scheduler = sampling.make_scheduler(family, scheduler, config)
    for negative in (None, "blurry"):
        expected, found = (paint(pipeline, model, negative) for pipeline in (own, served))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # The loop on the device, and diffusers' loop over the same engines.
    loop = unittest.mock.Mock(side_effect=denoise)
    monkeypatch.setattr(pipelines, "denoise", loop)
    for scheduler in family.schedulers:
        served.scheduler = sampling.make_scheduler(family, scheduler, own.scheduler.config)
        found = paint(served, model, "blurry")
        diffusers_loop = functools.partial(type(own).__call__, served)
        expected = paint(diffusers_loop, model, "blurry")
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert loop.call_count == len(family.schedulers)
    with pytest.raises(ConfigError, match="clip_skip"):
        served(PROMPT, num_inference_steps=1, clip_skip=1, guidance_scale=1.0)
    if model.few_steps:
        with pytest.raises(ShapeError, match="built without guidance") as raised:
            served(PROMPT, num_inference_steps=1, guidance_scale=5.0)
        assert "guidance_scale=1" in str(raised.value)
    # Without a size, it is that of the engines; the model's folder alone is read.
    image = served(PROMPT, num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    assert np.asarray(image).shape == (1, model.image.height, model.image.width, 3)
