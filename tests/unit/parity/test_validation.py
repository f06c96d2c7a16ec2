"""A target is validated on a recorded reference: sound engines pass, broken ones are reported."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper

from diffusion_engines import manifests
from diffusion_engines.backends import backend
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from diffusion_engines.config import (
    params_from_config,
)
from diffusion_engines.errors import ConfigError, IntegrityError
from diffusion_engines.layout import Workspace
from diffusion_engines.parity.results import Validation, read_validation, write_validation
from diffusion_engines.parity.scorers import ALEXNET
from diffusion_engines.parity.validation import validate_target
from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.runtime import sampling
from diffusion_engines.runtime.assemble import torch_networks
from diffusion_engines.runtime.bundle import wrap_engine
from diffusion_engines.runtime.recording import record_reference
from tests.conftest import COMPONENTS, ROOT, Exports, graph_of
from tests.manifests import built_manifest, graph_manifest

CPU = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild("all", tf32=False))
ALL = dict.fromkeys(COMPONENTS, "fp32")
STEPS = 3


@pytest.fixture(scope="module")
def built(tiny_weights: Path, exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, a recorded reference and sound fp32 bundles, as the stages write them."""
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(tiny_weights, Workspace(root).weights)
    networks = torch_networks("fp32", "cpu", weights=tiny_weights)
    reference = Workspace(root).reference
    reference.mkdir()
    settings = sampling.Settings("lms", STEPS, 7.5, 128, 128)
    model = sampling.load_model(tiny_weights)
    record_reference(
        networks, model, settings, ["lemons"], reference, seed=0, batch_size=1, frames=2
    )
    manifests.write(reference, manifests.Reference(2))
    for name in COMPONENTS:
        loaded, path = exports(name, exporter="torchscript", opset=17)
        engine, bundle = root / "engines" / name, Workspace(root).bundle("cpu", name)
        for folder in (engine, bundle):
            folder.mkdir(parents=True)
        made = graph_manifest(name, "fp32", loaded.inputs)
        built = graph_of(path, loaded.inputs, "fp32", name)
        result = backend("onnxruntime").build(built, engine, CPU)
        manifests.write(engine, built_manifest(f"cpu-{name}", made, CPU, result))
        wrap_engine(engine, bundle)
    return root


@pytest.fixture
def workspace(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy to change; the current folder is another one, and nothing may be read from it."""
    shutil.copytree(built / "artifacts", tmp_path / "artifacts")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return Workspace(tmp_path)


@pytest.fixture(scope="module")
def tolerances() -> Any:
    return params_from_config(yaml.safe_load((ROOT / "params.yaml").read_text()))["validate"]


def validate(
    workspace: Workspace, tolerances: Any, components: dict[str, str] = ALL
) -> tuple[str, ...]:
    result, pictures = validate_target("cpu", components, tolerances, workspace, device="cpu")
    folder = workspace.validation("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    metrics, plots = workspace.metrics("validate", "cpu"), workspace.plots("validate", "cpu")
    write_validation(result, pictures, folder, metrics, plots)
    assert read_validation(folder) == result
    return result.misses


def results(workspace: Workspace) -> tuple[dict[str, Any], Validation]:
    return (
        json.loads(workspace.metrics("validate", "cpu").read_text()),
        read_validation(workspace.validation("cpu")),
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite_weights(workspace: Workspace, component: str, change: Any) -> None:
    """Change an engine's first convolution kernel or matrix, and vouch for it in the manifest."""
    bundle = workspace.bundle("cpu", component)
    model = onnx.load(bundle / "engine.onnx")
    weight = next(i for i in model.graph.initializer if len(i.dims) >= 2)
    array = numpy_helper.to_array(weight).copy()
    change(array)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    (bundle / "engine.onnx.data").unlink()
    onnx.save(
        model, bundle / "engine.onnx", save_as_external_data=True, location="engine.onnx.data"
    )
    manifests.write(bundle, manifests.read(bundle, manifests.Bundle, verify=False))


def test_sound_engines_meet_the_default_tolerances(workspace: Workspace, tolerances: Any) -> None:
    assert validate(workspace, tolerances) == ()
    metrics, details = results(workspace)
    assert 0 < metrics["unet_rel_l2"] < 1e-4
    assert metrics["not_finite"] == 0
    assert metrics["psnr"] > 60
    assert metrics["ssim"] > 0.999
    assert details.misses == ()
    calls = [row["component"] for row in table(workspace.validation("cpu") / "steps.csv")]
    assert {name: calls.count(name) for name in calls} == {
        "text_encoder": 2,  # with and without the prompt
        "unet": STEPS,
        "vae_decoder": 1,
    }
    plotted = table(workspace.plots("validate", "cpu") / "denoiser.csv")
    assert {row["component"] for row in plotted} == {"unet"}
    latents = table(workspace.validation("cpu") / "trajectory.csv")
    assert [(row["image"], row["step"]) for row in latents] == [
        ("0", str(step)) for step in range(1, STEPS + 1)
    ]
    assert metrics["latents_rel_l2"] == max(float(row["rel_l2"]) for row in latents)
    assert 0 < metrics["latents_rel_l2"] < 1e-4
    assert metrics["latents_cosine"] > 0.999999
    assert table(workspace.plots("validate", "cpu") / "latents.csv") == latents
    picture = workspace.validation("cpu") / "image-00.png"
    shown = workspace.plots("validate", "cpu") / "images/image-00.png"
    assert shown.read_bytes() == picture.read_bytes()


def test_a_broken_engine_is_reported_and_the_measurements_are_kept(
    workspace: Workspace, tolerances: Any
) -> None:
    def scale(array: Any) -> None:
        array *= 1.05

    rewrite_weights(workspace, "unet", scale)
    misses = validate(workspace, tolerances)
    assert any(miss.startswith("unet (fp32), call 0: rel_l2") for miss in misses)
    assert not any(miss.startswith(("text_encoder", "vae_decoder")) for miss in misses)
    metrics, details = results(workspace)
    assert metrics["unet_rel_l2"] > 1e-4
    assert details.misses == misses
    # Of a whole run, the first step that is out of tolerance; later ones only inherit it.
    assert len([miss for miss in misses if miss.startswith("latents of image 0, step ")]) == 1
    found = [float(row["rel_l2"]) for row in table(workspace.validation("cpu") / "trajectory.csv")]
    assert max(found) == metrics["latents_rel_l2"] > tolerances.latents["fp32"].rel_l2


def test_nan_in_an_engine_is_counted_and_its_image_is_worthless(
    workspace: Workspace, tolerances: Any
) -> None:
    def break_one(array: Any) -> None:
        array.flat[0] = float("nan")

    rewrite_weights(workspace, "unet", break_one)
    misses = validate(workspace, tolerances)
    assert any("values are NaN or infinite" in miss for miss in misses)
    assert any("image 0: PSNR 0.0 dB" in miss for miss in misses)
    assert any(miss.startswith("latents of image 0, step 1 of 3: ") for miss in misses)
    metrics, _ = results(workspace)
    assert metrics["not_finite"] > 0
    assert (metrics["psnr"], metrics["ssim"]) == (0, 0)


def test_components_without_an_engine_run_in_pytorch(workspace: Workspace, tolerances: Any) -> None:
    shutil.rmtree(workspace.bundle("cpu", "vae_decoder"))
    components = {"unet": "fp32", "text_encoder": "fp32"}
    assert validate(workspace, tolerances, components) == ()
    _, details = results(workspace)
    assert {part.component for part in details.components} == set(components)


def test_a_missing_tolerance_fails_before_an_engine_is_loaded(
    workspace: Workspace, tolerances: Any
) -> None:
    shutil.rmtree(workspace.bundles("cpu"))
    lacking = replace(tolerances, components={"unet": {}})
    with pytest.raises(ConfigError, match=r"validate\.components\.unet\.fp32 has no tolerance"):
        validate(workspace, lacking, {"unet": "fp32"})
    for section in ("latents", "images"):
        with pytest.raises(ConfigError, match=rf"validate\.{section}\.fp32 has no tolerance"):
            validate(workspace, replace(tolerances, **{section: {}}), {"unet": "fp32"})


def test_scorers_that_are_not_there_are_said_to_be_not_there(
    workspace: Workspace, tolerances: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(workspace, tolerances) == ()
    metrics, details = results(workspace)
    printed = capsys.readouterr().out
    assert metrics["lpips"] is metrics["clip"] is metrics["clip_reference"] is None
    for name, path in (("lpips", f"lpips/checkpoints/{ALEXNET}"), ("clip", "clip")):
        reason = f"{workspace.root / tolerances.scorers / path} is not there"
        assert details.not_scored[name] == reason
        assert f"{name}: not measured, {reason}" in printed


def test_a_clip_model_scores_the_images_and_the_reference(
    workspace: Workspace, tolerances: Any, tiny_clip: Path
) -> None:
    assert validate(workspace, replace(tolerances, scorers=str(tiny_clip.parent))) == ()
    metrics, details = results(workspace)
    (image,) = details.images
    assert (image.clip, image.clip_reference) == (metrics["clip"], metrics["clip_reference"])
    assert "clip" not in details.not_scored
    assert metrics["clip"] == pytest.approx(metrics["clip_reference"], abs=0.05)
    assert metrics["clip"] > 0


def test_a_damaged_reference_is_refused(workspace: Workspace, tolerances: Any) -> None:
    path = workspace.reference / "unet.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"unet\.safetensors is damaged"):
        validate(workspace, tolerances)


def test_damaged_weights_are_refused(workspace: Workspace) -> None:
    path = workspace.weights / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match="wrong size"), torch.no_grad():
        torch_networks("fp32", "cpu", weights=workspace.weights)


def test_every_precision_has_tolerances() -> None:
    tolerances = params_from_config(yaml.safe_load((ROOT / "params.yaml").read_text()))["validate"]
    assert set(tolerances.images) == set(tolerances.latents) == set(PRECISIONS)
    for component in COMPONENTS:
        assert set(tolerances.components[component]) == set(PRECISIONS)
