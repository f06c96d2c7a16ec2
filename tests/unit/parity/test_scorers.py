"""Scorers score where they are installed, and say why not elsewhere; none is ever downloaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_engines.errors import HardwareError, IntegrityError
from diffusion_engines.parity import scorers
from diffusion_engines.parity.whole_runs import Run
from tests.doubles.torchvision import alexnet_features, torchvision_double

PROMPTS = ("a lemon", "a very long prompt about lemons " * 40)


def run_of(images: torch.Tensor) -> Run:
    return Run(PROMPTS, torch.zeros(len(images), 1), images)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights for AlexNet where LPIPS looks for the trained ones."""
    folder = tmp_path / "lpips" / "checkpoints"
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.ModuleDict({"features": alexnet_features()})
    torch.save(layers.state_dict(), folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()
    monkeypatch.setattr(scorers, "ALEXNET", f"alexnet-{digest[:8]}.pth")
    return (folder / "weights").rename(folder / scorers.ALEXNET)


@pytest.fixture
def torchvision(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchmetrics and the scorer find the double."""
    importlib.import_module("torchmetrics.functional.image")  # what else it has needs the real one
    found = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "torchvision", torchvision_double(weights.name))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "torchvision" or found(name)
    )
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", True)


@pytest.mark.usefixtures("torchvision")
def test_lpips_grows_with_the_difference(tmp_path: Path, images: torch.Tensor) -> None:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    kept = torch.hub.get_dir()
    found = [
        scorers.lpips(run_of((images + amount * noise).clamp(0, 1)), run_of(images), tmp_path)
        for amount in (0.0, 0.02, 0.2)
    ]
    assert [score.missing for score in found] == [""] * 3
    equal, near, far = (score.images or () for score in found)
    assert equal == (0, 0)
    assert all(0 < x < y for x, y in zip(near, far, strict=True))
    assert torch.hub.get_dir() == kept


@pytest.mark.usefixtures("torchvision")
def test_an_image_with_nan_has_the_worst_lpips(tmp_path: Path, images: torch.Tensor) -> None:
    broken = images.clone()
    broken[1, 0, 0, 0] = math.nan
    assert scorers.lpips(run_of(broken), run_of(images), tmp_path).images == (0, math.inf)


def test_weights_without_torchvision_are_an_error(
    tmp_path: Path, weights: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchvision" else found(name)
    )
    with pytest.raises(HardwareError, match=r"torchvision is not installed[\s\S]*\[perceptual\]"):
        scorers.lpips(run_of(images), run_of(images), tmp_path)


@pytest.mark.usefixtures("torchvision")
def test_damaged_weights_are_refused(tmp_path: Path, weights: Path, images: torch.Tensor) -> None:
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match="its SHA-256 begins with"):
        scorers.lpips(run_of(images), run_of(images), tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path, images: torch.Tensor) -> None:
    for scorer, path in (
        (scorers.lpips, tmp_path / "lpips" / "checkpoints" / scorers.ALEXNET),
        (scorers.clip_score, tmp_path / "clip"),
    ):
        found = scorer(run_of(images), run_of(images), tmp_path)
        assert found == scorers.Scores(missing=f"{path} is not there")


def test_clip_scores_are_those_of_the_model(tiny_clip: Path, images: torch.Tensor) -> None:
    other = images.flip(0)
    found = scorers.clip_score(run_of(images), run_of(other), tiny_clip.parent)
    swapped = scorers.clip_score(run_of(other), run_of(images), tiny_clip.parent)
    assert found.images == swapped.reference
    assert found.reference == swapped.images
    assert found.images is not None
    assert all(0 < score <= 100 for score in found.images)

    from transformers import CLIPModel, CLIPProcessor

    from diffusion_engines.runtime.recording import picture

    processor = CLIPProcessor.from_pretrained(tiny_clip)
    inputs = processor(text=[PROMPTS[0]], images=[picture(images[0])], return_tensors="pt")
    model = CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        logits = float(model(**inputs).logits_per_image)
        expected = 100 * logits / float(model.logit_scale.exp())
    assert found.images[0] == pytest.approx(expected, abs=1e-3)


def test_an_image_with_nan_has_the_worst_clip_score(tiny_clip: Path, images: torch.Tensor) -> None:
    found = scorers.clip_score(run_of(images * math.nan), run_of(images), tiny_clip.parent)
    assert found.images == (0, 0)


@pytest.mark.parametrize(
    "missing",
    ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"],
)
def test_an_incomplete_clip_model_is_refused(
    tiny_clip: Path, tmp_path: Path, images: torch.Tensor, missing: str
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    (tmp_path / "clip" / missing).unlink()
    with pytest.raises(IntegrityError, match=rf"holds no CLIP model[\s\S]*no {missing}"):
        scorers.clip_score(run_of(images), run_of(images), tmp_path)


def test_a_clip_model_that_lacks_weights_is_refused(
    tiny_clip: Path, tmp_path: Path, images: torch.Tensor
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_projection.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"no weights text_projection\.weight"):
        scorers.clip_score(run_of(images), run_of(images), tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="holds no CLIP model"):
        scorers.clip_score(run_of(images), run_of(images), tmp_path)
