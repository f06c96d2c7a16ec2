"""A diffusers pipeline made of engines paints what diffusers' own paints, and refuses the rest."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from diffusion_engines import load_component, load_pipeline, manifests
from diffusion_engines.config import Dynamic
from diffusion_engines.errors import (
    ConfigError,
    FingerprintError,
    HardwareError,
    IntegrityError,
    ShapeError,
)
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.files import write_json
from diffusion_engines.manifests import Bundle, Pipeline
from diffusion_engines.runtime.networks import read_config
from diffusion_engines.weights.fuse import fuse_loras
from diffusion_engines.weights.lora import read_lora
from diffusion_engines.weights.sources import fill_with_random_weights
from tests.conftest import ROOT, TINY, write_bundles
from tests.loras import write_lora
from tests.manifests import weights_manifest
from tests.tiers import long

PROMPT = "A big banana leaf with lemons in front of it"


@pytest.fixture(scope="module")
def own(tiny_weights: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_weights, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def served(tiny_bundles: Path) -> Any:
    pipeline: Any = load_pipeline(tiny_bundles, threads=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copy(tiny_bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles, tmp_path / "cpu"))


def paint(pipeline: Any, prompt: Any = PROMPT, **settings: Any) -> np.ndarray:
    defaults = {"num_inference_steps": 3, "negative_prompt": "blurry", "output_type": "np"}
    generator = torch.Generator().manual_seed(7)
    return pipeline(prompt, generator=generator, **{**defaults, **settings}).images


@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance_scale": 1.0}, {"guidance_scale": 3.0, "height": 128, "width": 128}],
    ids=["defaults", "no guidance", "size"],
)
def test_the_pictures_are_those_of_diffusers(own: Any, served: Any, settings: Any) -> None:
    expected, found = paint(own, **settings), paint(served, **settings)
    assert found.shape == (1, 128, 128, 3)
    assert expected.std() > 0.01  # a picture, not one colour
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_serving_code_changes_the_scheduler_as_ever(own: Any, tiny_bundles: Path) -> None:
    served: Any = load_pipeline(tiny_bundles, device="cpu")
    pipelines = [own, served.to("cpu")]
    before = own.scheduler
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    expected, found = (paint(pipeline) for pipeline in pipelines)
    own.scheduler = before
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(paint(own) - expected).max() > 1e-3  # another scheduler, another picture


@long
def test_an_open_engine_takes_several_images_and_sizes(
    own: Any, tiny_weights: Path, tmp_path: Path
) -> None:
    bounds = Dynamic(batch_size=[1, 2], height=[64, 192], width=[64, 192])
    write_bundles(tiny_weights, tmp_path / "cpu", bounds)
    served: Any = load_pipeline(tmp_path / "cpu")
    served.set_progress_bar_config(disable=True)
    two = {"prompt": [PROMPT, "lemons"], "negative_prompt": ["", "red"], "height": 64, "width": 192}
    expected, found = paint(own, **two), paint(served, **two)
    assert found.shape == (2, 64, 192, 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    with pytest.raises(ShapeError, match="batch 1 to 2"):
        paint(served, ["a", "b", "c"], negative_prompt=["", "", ""])
    with pytest.raises(ShapeError, match=r"64 to 192 in steps of \d+ pixels"):
        paint(served, height=256, width=128)


@long
def test_half_precision_engines_come_close(own: Any, tiny_weights: Path, tmp_path: Path) -> None:
    write_bundles(tiny_weights, tmp_path / "cpu", precision="fp16")
    served: Any = load_pipeline(tmp_path / "cpu")
    served = served.to(torch.float16)
    served.set_progress_bar_config(disable=True)
    difference = np.abs(paint(served) - paint(own))
    assert 1e-5 < difference.max() < 0.05  # it is another precision, and the same picture


def test_a_batch_that_the_engines_lack_is_refused_with_what_they_take(served: Any) -> None:
    with pytest.raises(ShapeError, match=r"cpu-text_encoder .*\n +expected: batch 1\n"):
        paint(served, ["a", "b"], negative_prompt=["", ""])
    with pytest.raises(ShapeError, match=r"cpu-unet .*\n +expected: batch 2\n +found: +batch 4"):
        paint(served, num_images_per_prompt=2)
    with pytest.raises(ShapeError, match=r"height 16 \(128 pixels\)"):
        paint(served, height=64, width=128)


def test_what_no_engine_has_an_input_for_is_refused(served: Any) -> None:
    with pytest.raises(ConfigError, match="no input for output_hidden_states"):
        paint(served, clip_skip=1)
    with pytest.raises(ConfigError, match="no input for cross_attention_kwargs"):
        paint(served, cross_attention_kwargs={"gligen": 1})


def test_an_engine_stays_where_and_as_it_was_built(served: Any, tiny_bundles: Path) -> None:
    with pytest.raises(HardwareError, match="cannot be moved"):
        served.to("cuda")
    with pytest.raises(HardwareError, match="cannot change its precision"):
        served.to(torch.float16)
    with pytest.raises(HardwareError, match="does not run on cuda"):
        load_pipeline(tiny_bundles, device="cuda")


def test_the_folder_alone_is_enough(own: Any, copy: Path) -> None:
    # In a process of its own, elsewhere: nothing of the repository can be reached.
    code = (
        "import numpy, torch, diffusion_engines\n"
        "pipe = diffusion_engines.load_pipeline('cpu')\n"
        "images = pipe('x', num_inference_steps=2, output_type='np', \n"
        "              generator=torch.Generator().manual_seed(7)).images\n"
        "numpy.save('images.npy', images)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=copy.parent, check=True, timeout=300)
    expected = paint(own, "x", num_inference_steps=2, negative_prompt=None)
    np.testing.assert_allclose(np.load(copy.parent / "images.npy"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "unet/engine.onnx",
        "pipeline/tokenizer/vocab.json",
        "pipeline/scheduler/scheduler_config.json",
    ],
)
def test_a_damaged_file_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{Path(name).name} is damaged"):
        load_pipeline(copy)


def test_a_missing_engine_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "vae_decoder")
    with pytest.raises(IntegrityError, match="no engine of vae_decoder") as raised:
        load_pipeline(copy)
    assert "found:    pipeline, text_encoder, unet" in str(raised.value)


def list_files(folder: Path, kind: Any) -> None:
    """Write the manifest anew, as whoever may write the folder can."""
    manifests.write(folder, manifests.read(folder, kind, verify=False))


@pytest.mark.parametrize(
    "name",
    ["pipeline/tokenizer/added_tokens.json", "pipeline/tokenizer/tokenizer.json", "unet/.hidden"],
)
def test_a_file_that_no_manifest_lists_is_refused(copy: Path, name: str) -> None:
    """Transformers reads the first two of itself: another picture, or an error of its own."""
    (copy / name).write_text('{"lemon": 999}')
    with pytest.raises(IntegrityError, match="files that its manifest does not list") as raised:
        load_pipeline(copy)
    assert f"found:    {name.split('/', 1)[1]}" in str(raised.value)


def test_a_link_to_a_folder_is_a_file_that_no_manifest_lists(copy: Path) -> None:
    (copy / "pipeline/more").symlink_to(copy / "unet")
    with pytest.raises(IntegrityError, match="does not list"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda files: {}, "files that its manifest does not list"),
        (lambda files: without(files, "engine.onnx"), r"does not list\n.*\n +found: +engine\.onnx"),
        (lambda files: without(files, "engine.onnx.data"), r"does not list(.*\n){2}.*onnx\.data"),
        (lambda files: files | {"/etc/hostname": files["engine.onnx"]}, "inside of its folder"),
        (lambda files: files | {"../unet/engine.onnx": files["engine.onnx"]}, "inside of its"),
        (lambda files: files | {"./engine.onnx": files["engine.onnx"]}, "inside of its folder"),
    ],
    ids=["none", "no engine", "no data", "absolute", "outside", "not plain"],
)
def test_a_manifest_lists_the_files_of_its_folder(copy: Path, change: Any, expected: str) -> None:
    path = copy / "vae_decoder/manifest.json"
    edit_manifest(path, files=change(json.loads(path.read_text())["files"]))
    with pytest.raises(IntegrityError, match=expected):
        load_component(copy / "vae_decoder")


def without(files: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in files.items() if key != name}


def test_an_engine_is_in_its_own_folder_and_whole(copy: Path) -> None:
    edit_manifest(copy / "vae_decoder/manifest.json", engine="../unet/engine.onnx")
    with pytest.raises(
        IntegrityError, match=r"engine \.\./unet/engine\.onnx is not among its files"
    ):
        load_component(copy / "vae_decoder")
    (copy / "unet/engine.onnx.data").unlink()
    list_files(copy / "unet", Bundle)
    with pytest.raises(IntegrityError, match=r"cannot load .*unet/engine\.onnx"):
        load_component(copy / "unet")


def test_an_engine_in_another_components_folder_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "vae_decoder")
    (copy / "unet").rename(copy / "vae_decoder")
    shutil.copytree(copy / "vae_decoder", copy / "unet")
    with pytest.raises(IntegrityError, match="holds the engine of another component") as raised:
        load_pipeline(copy)
    assert "found:    cpu-unet, of the component unet" in str(raised.value)


@pytest.mark.parametrize(
    "name", ["tokenizer/vocab.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_what_a_pipeline_cannot_be_without_is_named(copy: Path, name: str) -> None:
    (copy / "pipeline" / name).unlink()
    list_files(copy / "pipeline", Pipeline)
    with pytest.raises(IntegrityError, match=rf"pipeline lacks {name}\n"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("model_index.json", {"tokenizer": None}, "cannot be read as a model"),
        ("model_index.json", {"tokenizer": ["transformers", "NoTokenizer"]}, "cannot be read"),
        ("scheduler/scheduler_config.json", {"_class_name": None}, "names no scheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "UNet2DModel"}, "names no scheduler"),
    ],
)
def test_what_no_model_says_is_refused_in_a_sentence(
    copy: Path, name: str, changes: dict[str, Any], expected: str
) -> None:
    edit_manifest(copy / "pipeline" / name, **changes)
    list_files(copy / "pipeline", Pipeline)
    with pytest.raises(IntegrityError, match=expected):
        load_pipeline(copy)


def test_a_flipped_bit_of_a_manifest_is_harmless_or_refused(copy: Path) -> None:
    path = copy / "vae_decoder/manifest.json"
    good, chosen = path.read_bytes(), random.Random(5)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    expected, refused = load_component(path.parent)(latents), 0
    for _ in range(100):
        damaged = bytearray(good)
        damaged[chosen.randrange(len(good))] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_component(path.parent)(latents)
        except (IntegrityError, FingerprintError):
            refused += 1
        else:
            assert torch.equal(found, expected), damaged.decode()
    assert refused > 50


def edit_manifest(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def test_engines_of_another_model_or_library_are_refused(copy: Path) -> None:
    edit_manifest(copy / "unet/manifest.json", model="sd14")
    with pytest.raises(IntegrityError, match="mixes engines of different models"):
        load_pipeline(copy)
    edit_manifest(copy / "unet/manifest.json", fingerprint={"device": "cpu", "onnxruntime": "1.0"})
    with pytest.raises(FingerprintError, match="another onnxruntime"):
        load_component(copy / "unet")


def pack_of(weights: Path, copy: Path) -> None:
    """Replace what is beside the engines by what goes with other weights of the same name."""
    shutil.rmtree(copy / "pipeline")
    write_bundles(weights, copy, only=())


def test_engines_of_other_weights_of_the_same_name_are_refused(copy: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    fill_with_random_weights(TINY, weights, seed=1, dtype="fp32")
    for name in FAMILY.folders:
        manifests.write(weights / name, weights_manifest(seed=1))
    write_bundles(weights, tmp_path / "other", only=["vae_decoder"])
    shutil.rmtree(copy / "vae_decoder")
    shutil.copytree(tmp_path / "other/vae_decoder", copy / "vae_decoder")
    with pytest.raises(IntegrityError, match="different weights of tiny") as raised:
        load_pipeline(copy)
    assert re.search(
        r"expected: random numbers of seed 0, digest \w{12}, as in pipeline/", str(raised.value)
    )
    assert re.search(
        r"found: +random numbers of seed 1, digest \w{12}, in vae_decoder/", str(raised.value)
    )


def test_an_engine_without_the_pipelines_lora_is_refused_and_what_it_leaves_alone_is_not(
    copy: Path, weights_copy: Path, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "ink.safetensors", weights_copy)
    config = read_config(FAMILY.denoiser, weights_copy / "unet")
    lora = read_lora(tmp_path, path.name, 0.8, FAMILY, config)
    fused = fuse_loras([lora], weights_copy)
    manifests.write(weights_copy / "unet", weights_manifest(loras=fused["unet"]))
    pack_of(weights_copy, copy)
    with pytest.raises(IntegrityError, match="different weights of tiny") as raised:
        load_pipeline(copy)
    assert "seed 0, with ink.safetensors × 0.8 (sha256 " in str(raised.value)
    assert "in unet/manifest.json" in str(raised.value)
    shutil.rmtree(copy / "unet")
    write_bundles(weights_copy, tmp_path / "fused", only=["unet"])
    shutil.copytree(tmp_path / "fused/unet", copy / "unet")
    assert load_pipeline(copy).unet.engine.name == "cpu-unet"  # the other engines are as before


def test_engines_of_format_1_are_loaded_by_the_models_name(copy: Path) -> None:
    """Committed manifests of that format, of engines and a pipeline that are made here."""
    for kind, folder in (("bundle", "unet"), ("pipeline", "pipeline")):
        path = copy / folder / "manifest.json"
        made = json.loads(path.read_text())
        old = json.loads((ROOT / "tests/data/format-1" / f"{kind}.json").read_text())
        here = {key: made[key] for key in ("files", "fingerprint") if key in made}
        write_json(path, old | here)
    assert load_component(copy / "unet").name == "cpu-unet"
    assert load_pipeline(copy).unet.config["sample_size"] == 16
    edit_manifest(copy / "unet/manifest.json", model="sd14")
    with pytest.raises(IntegrityError, match="mixes engines of different models"):
        load_pipeline(copy)


def test_a_pipeline_that_cannot_be_made_is_named(copy: Path) -> None:
    index = copy / "pipeline/model_index.json"
    edit_manifest(index, _class_name="StableDiffusion3Pipeline")
    list_files(copy / "pipeline", Pipeline)
    with pytest.raises(ConfigError, match="whose pipeline no engines are built for") as raised:
        load_pipeline(copy)
    assert "found:    StableDiffusion3Pipeline" in str(raised.value)


def test_a_component_is_a_module(tiny_bundles: Path) -> None:
    unet = load_component(tiny_bundles / "unet")
    assert isinstance(unet, torch.nn.Module)
    noise = unet(torch.randn(2, 4, 16, 16), torch.tensor([999.0]), torch.randn(2, 77, 32))
    assert noise.shape == (2, 4, 16, 16)
    with pytest.raises(ShapeError, match="batch 2"):
        unet(torch.randn(1, 4, 16, 16), torch.tensor([999.0]), torch.randn(1, 77, 32))


def test_importing_the_package_is_instant() -> None:
    code = (
        "import sys, diffusion_engines; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
