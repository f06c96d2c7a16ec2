"""Images of prompts: they are the pipeline's own, and carry what they were made with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from diffusion_engines import load_pipeline
from diffusion_engines.config import Dynamic, Generate
from diffusion_engines.errors import ConfigError, IntegrityError
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.files import sha256_of_file
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import this_machine
from diffusion_engines.runtime.sampling import Settings, make_scheduler
from diffusion_engines.runtime.shapes import CheckedEngine
from diffusion_engines.serve.generation import (
    check_size,
    generate_images,
    images_per_call,
    read_settings,
)
from tests.conftest import COMPONENTS, IMAGE, STATIC
from tests.manifests import engine_manifest, graph_manifest

ALL = dict.fromkeys(COMPONENTS, "fp32")
GENERATE = Generate(
    prompts=["lemons", "レモン, 'ripe'"],
    images_per_prompt=2,
    negative_prompt="blurry",
    scheduler="ddim",
    steps=3,
    guidance_scale=5.0,
    seed=7,
    height=None,
    width=None,
    frames=3,
    folder=None,
)


@pytest.fixture(scope="module")
def workspace(
    tiny_bundles: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("generate"))
    shutil.copytree(tiny_bundles, workspace.bundles("cpu"))
    shutil.copytree(tiny_weights, workspace.weights)
    return workspace


def generate(
    workspace: Workspace, folder: Path, components: dict[str, str] = ALL, **changes: Any
) -> Path:
    folder.mkdir(parents=True)
    generate_images(
        "cpu",
        components,
        replace(GENERATE, **changes),
        IMAGE,
        folder,
        workspace=workspace,
        device="cpu",
        machine=this_machine(),
    )
    return folder


@pytest.fixture(scope="module")
def made(workspace: Workspace) -> Path:
    return generate(workspace, workspace.root / "made")


def test_each_prompt_gets_its_images(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == [
        "durations.json",
        *(f"image-{i:02d}.{kind}" for i in range(4) for kind in ("gif", "png")),
    ]
    pictures = [np.asarray(Image.open(made / f"image-{i:02d}.png")) for i in range(4)]
    assert all(picture.shape == (128, 128, 3) for picture in pictures)
    for i in range(3):
        assert np.abs(pictures[i].astype(int) - pictures[i + 1]).max() > 2


def test_an_image_carries_its_settings_and_they_make_it_again(
    made: Path, workspace: Workspace
) -> None:
    path = made / "image-03.png"
    settings = read_settings(path)
    assert settings["prompt"] == "レモン, 'ripe'"
    assert settings["seed"] == 7 + 3
    assert settings["synthetic"] is True
    assert settings["loras"] == {}
    with Image.open(path) as image:
        assert image.info["Description"] == "レモン, 'ripe'"
    for name in COMPONENTS:
        manifest = workspace.bundle("cpu", name) / "manifest.json"
        engine = settings["engines"][name]
        assert engine["manifest_sha256"] == sha256_of_file(manifest)
        assert engine["fingerprint"] == json.loads(manifest.read_text())["fingerprint"]

    pipeline: Any = load_pipeline(workspace.bundles("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(FAMILY, settings["scheduler"], pipeline.scheduler.config)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(settings["seed"]))
    (again,) = pipeline(
        settings["prompt"],
        negative_prompt=settings["negative_prompt"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        latents=noise,
    ).images
    found = np.asarray(Image.open(path)).astype(int)
    assert np.abs(found - np.asarray(again)).max() <= 1


def test_the_animation_shows_how_it_came_about(made: Path) -> None:
    with Image.open(made / "image-00.gif") as animation:
        assert isinstance(animation, GifImageFile)
        assert animation.n_frames == 3
        frames = []
        for index in range(3):
            animation.seek(index)
            frames.append(np.asarray(animation.convert("RGB")).astype(int))
    assert np.abs(frames[0] - frames[2]).mean() > 1


def test_the_timings_add_up(made: Path) -> None:
    timings = json.loads((made / "durations.json").read_text())
    assert [batch["images"] for batch in timings["batches"]] == [[0], [1], [2], [3]]
    assert timings["machine"]["cores"] > 0
    for batch in timings["batches"]:
        found = batch["milliseconds"]
        assert len(batch["denoiser_per_step"]) == 3
        assert sum(batch["denoiser_per_step"]) == pytest.approx(found["denoiser"], abs=0.01)
        loop = found["denoiser"] + found["scheduler_and_guidance"]
        assert loop == pytest.approx(found["denoising_loop"], abs=0.01)
        parts = found["encoding"] + found["denoising_loop"] + found["decoding"]
        assert parts == pytest.approx(found["total"], abs=0.01)


def test_components_without_an_engine_run_in_pytorch(
    made: Path, workspace: Workspace, tmp_path: Path
) -> None:
    folder = generate(
        workspace,
        tmp_path / "out",
        {"unet": "fp32"},
        frames=0,
        prompts=["lemons"],
        images_per_prompt=1,
    )
    assert sorted(path.name for path in folder.iterdir()) == ["durations.json", "image-00.png"]
    engines = read_settings(folder / "image-00.png")["engines"]
    assert engines["vae_decoder"] == {"backend": "PyTorch", "precision": "fp32"}
    assert engines["unet"]["name"] == "cpu-unet"
    ours, theirs = (
        np.asarray(Image.open(where / "image-00.png")).astype(int) for where in (folder, made)
    )
    assert np.abs(ours - theirs).max() <= 1


def test_a_size_that_the_engines_lack_stops_before_any_work(
    workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"generate\.width: the engine cpu-unet") as raised:
        generate(workspace, tmp_path / "out", width=256)
    assert "expected: 128 pixels" in str(raised.value)
    assert list((tmp_path / "out").iterdir()) == []


def engines(dynamic: Dynamic) -> dict[str, CheckedEngine]:
    architectures: dict[str, dict[str, Any]] = {
        "text_encoder": {},
        "unet": {"in_channels": 4, "cross_attention_dim": 8, "block_out_channels": [1, 2, 3]},
        "vae_decoder": {"latent_channels": 4},
    }
    return {
        name: CheckedEngine(
            torch.nn.Identity(),
            engine_manifest(
                f"cpu-{name}",
                graph_manifest(name, inputs=spec.inputs(architectures[name], IMAGE, dynamic)),
            ),
        )
        for name, spec in COMPONENTS.items()
    }


def test_open_engines_take_their_range_of_sizes_and_batches() -> None:
    networks = engines(Dynamic(batch_size=[2, 4], height=[64, 768], width=[64, 768]))
    settings = Settings("lms", 2, 7.5, 96, 736)
    check_size(networks, settings)
    with pytest.raises(ConfigError, match="expected: 64 to 768 in steps of 32 pixels"):
        check_size(networks, replace(settings, height=800))
    with pytest.raises(ConfigError, match="not built for 104 pixels"):
        check_size(networks, replace(settings, width=104))  # between two steps
    assert [images_per_call(networks, IMAGE, wanted) for wanted in (1, 3, 9)] == [2, 3, 4]
    assert images_per_call(engines(STATIC), IMAGE, 9) == 1
    assert images_per_call({"unet": torch.nn.Identity()}, replace(IMAGE, batch_size=3), 9) == 3


def test_a_picture_without_settings_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ConfigError, match="carries no settings"):
        read_settings(tmp_path / "x.png")


def test_a_damaged_pipeline_folder_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    damaged = Workspace(tmp_path)
    shutil.copytree(workspace.bundles("cpu"), damaged.bundles("cpu"))
    (damaged.pipeline("cpu") / "tokenizer/merges.txt").write_text("x")
    with pytest.raises(IntegrityError, match=r"merges\.txt has the wrong size"):
        generate(damaged, tmp_path / "out")
