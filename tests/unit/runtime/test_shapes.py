"""An engine takes the sizes of its manifest and refuses all others, saying which it takes."""

from __future__ import annotations

import pytest
import torch

from diffusion_engines.config import Dynamic
from diffusion_engines.errors import ShapeError
from diffusion_engines.runtime.shapes import CheckedEngine
from tests.conftest import COMPONENTS, IMAGE, STATIC
from tests.manifests import engine_manifest, graph_manifest

UNET = {"in_channels": 4, "cross_attention_dim": 32, "block_out_channels": [1, 2, 3]}
OPEN = Dynamic(batch_size=[1, 4], height=[64, 768], width=[64, 768])


class Echo(torch.nn.Module):
    def forward(self, latents: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return latents


def unet(dynamic: Dynamic = STATIC) -> CheckedEngine:
    inputs = COMPONENTS["unet"].inputs(UNET, IMAGE, dynamic)
    return CheckedEngine(Echo(), engine_manifest(graph=graph_manifest(inputs=inputs)))


def call(engine: CheckedEngine, batch: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return engine(torch.zeros(batch, 4, height, width), torch.zeros(1), torch.zeros(batch, 77, 32))


def test_a_fixed_engine_takes_its_one_size() -> None:
    assert call(unet()).shape == (2, 4, 16, 16)
    with pytest.raises(ShapeError) as raised:
        call(unet(), batch=8)
    for text in ("cpu-unet", "latents", "expected: batch 2", "found:    batch 8", "two rows per"):
        assert text in str(raised.value)
    with pytest.raises(ShapeError, match=r"expected: +height 16\n"):
        call(unet(), height=32)


def test_an_open_engine_takes_its_profile_and_names_it() -> None:
    engine = unet(OPEN)
    for batch, height, width in ((2, 8, 96), (8, 96, 8), (4, 16, 12)):
        assert call(engine, batch, height, width).shape == (batch, 4, height, width)
    for size in (4, 100, 18):  # below, above, between two steps
        with pytest.raises(ShapeError, match=r"expected: +height 8 to 96 in steps of 4\n"):
            call(engine, height=size)
    with pytest.raises(ShapeError, match="batch 2 to 8 in steps of 2, width 8 to 96"):
        call(engine, batch=10, width=200)


def test_the_remedy_is_one_that_helps() -> None:
    """export=dynamic opens batch, height and width of an engine that has one of each."""
    text = torch.zeros(2, 77, 32)
    for engine, latents, words, suggested, not_suggested in (
        (unet(), (2, 4, 32, 16), text, "export=dynamic", "widen"),
        (unet(OPEN), (2, 4, 200, 16), text, "widen the ranges", "export=dynamic"),
        (
            unet(OPEN),
            (10, 4, 16, 16),
            text,
            "two rows per image with guidance, and one without",
            "export=",
        ),
        (unet(), (2, 4, 16, 16), torch.zeros(2, 153, 32), "shorten the prompt", "dynamic"),
        (unet(), (2, 4, 16, 16), torch.zeros(2, 77, 64), "own text encoders", "dynamic"),
        (unet(OPEN), (2, 9, 16, 16), text, "text to image", "dynamic"),
    ):
        with pytest.raises(ShapeError) as raised:
            engine(torch.zeros(latents), torch.zeros(1), words)
        _, _, fix = str(raised.value).partition("fix:")
        assert suggested in fix
        assert not_suggested not in fix


def test_a_number_is_a_timestep_and_a_name_is_none() -> None:
    latents, text = torch.zeros(2, 4, 16, 16), torch.zeros(2, 77, 32)
    for timestep in (5, 5.0, torch.tensor(5)):
        assert unet()(latents, timestep, text).shape == latents.shape
    with pytest.raises(ShapeError, match=r"found: +0 tensor\(s\), sample=…, timestep=…"):
        unet()(sample=latents, timestep=5)
    with pytest.raises(ShapeError, match=r"takes no torch\.bool for latents"):
        unet()(latents > 0, 5, text)


def test_pixels_are_named_where_they_are_known() -> None:
    engine = unet(OPEN)
    engine.pixels_per_latent = 8
    with pytest.raises(ShapeError, match=r"8 to 96 in steps of 4 \(64 to 768 in steps of 32 pix"):
        call(engine, height=100)


def test_another_number_of_tensors_or_dimensions_is_refused() -> None:
    with pytest.raises(ShapeError, match="latents, timestep, text embeddings"):
        unet()(torch.zeros(2, 4, 16, 16))
    with pytest.raises(ShapeError, match="latents of 4 dimensions"):
        unet()(torch.zeros(4, 16, 16), torch.zeros(1), torch.zeros(2, 77, 32))
