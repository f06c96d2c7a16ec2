"""The inputs of each component, with fixed and with open dimensions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from diffusion_engines.config import Dynamic, Image
from diffusion_engines.errors import ConfigError
from diffusion_engines.families import family_of
from diffusion_engines.families.base import Dim
from diffusion_engines.families.parts import TOKENS
from tests.conftest import COMPONENTS, ROOT, STATIC

SD14_IMAGE = Image(height=512, width=768, batch_size=2, vae_scale_factor=8)
OPEN = Dynamic(batch_size=[1, 4], height=[256, 768], width=[320, 1024])


def architecture(name: str) -> dict[str, Any]:
    folder = ROOT / "conf/architecture/sd14" / COMPONENTS[name].folder
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("text_encoder", [(2, TOKENS)]),
        ("unet", [(4, 4, 64, 96), (1,), (4, TOKENS, 768)]),  # two halves for the guidance
        ("vae_decoder", [(2, 4, 64, 96)]),
    ],
)
def test_fixed_shapes_are_those_of_the_image(name: str, shapes: list[tuple[int, ...]]) -> None:
    inputs = COMPONENTS[name].inputs(architecture(name), SD14_IMAGE, STATIC)
    assert [value.size for value in inputs] == shapes
    assert [value.name for value in inputs] == [f"input_{i}" for i in range(len(shapes))]
    assert not any(value.dynamic for value in inputs)


def test_without_guidance_a_unet_gets_one_row_per_image() -> None:
    image = replace(SD14_IMAGE, guidance=False)
    latents, _, text = COMPONENTS["unet"].inputs(architecture("unet"), image, OPEN)
    assert latents.shape[:2] == (Dim("batch", 2, 1, 4), 4)
    assert text.shape[0] == latents.shape[0]


def test_sdxl_has_two_text_encoders_and_added_conditions() -> None:
    folder = ROOT / "conf/architecture/sdxl"
    family = family_of(folder)
    assert list(family.components) == ["text_encoder", "text_encoder_2", "unet", "vae_decoder"]
    assert family.folders[-3:] == ("tokenizer", "tokenizer_2", "scheduler")
    outputs = [value.role for value in family.component("text_encoder_2").outputs]
    assert outputs == ["hidden state", "pooled embedding"]
    config = json.loads((folder / "unet/config.json").read_text())
    image = Image(height=1024, width=768, batch_size=1, vae_scale_factor=8)
    inputs = family.component("unet").inputs(config, image, STATIC)
    shapes = [(2, 4, 128, 96), (1,), (2, TOKENS, 2048), (2, 1280), (2, 6)]
    assert [value.size for value in inputs] == shapes
    assert [value.dtype for value in inputs][3:] == ["component", "float32"]
    with pytest.raises(ConfigError, match="the model has no text_encoder_2") as raised:
        family_of(ROOT / "conf/architecture/sd14").component("text_encoder_2")
    assert "text_encoder, unet, vae_decoder" in str(raised.value)


def test_the_timestep_is_fp32_in_every_precision() -> None:
    _, timestep, _ = COMPONENTS["unet"].inputs(architecture("unet"), SD14_IMAGE, STATIC)
    assert timestep.dtype == "float32"


def test_open_dimensions_have_bounds_in_latents_and_steps_that_the_unet_can_halve() -> None:
    latents, timestep, text = COMPONENTS["unet"].inputs(architecture("unet"), SD14_IMAGE, OPEN)
    assert latents.shape == (
        Dim("batch", 4, 2, 8, 2),
        4,
        Dim("height", 64, 32, 96, 8),
        Dim("width", 96, 40, 128, 8),
    )
    assert not timestep.dynamic
    assert text.shape[0] == latents.shape[0]
    (decoded,) = COMPONENTS["vae_decoder"].inputs(architecture("vae_decoder"), SD14_IMAGE, OPEN)
    assert decoded.shape[0] == Dim("batch", 2, 1, 4)
    assert decoded.shape[2] == Dim("height", 64, 32, 96)
