"""A family without a UNet samples as any: the runtime asks by role and knows no name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from diffusion_engines.config import Dynamic, Image
from diffusion_engines.errors import ConfigError
from diffusion_engines.families.base import (
    Component,
    Family,
    Input,
    Model,
    Networks,
    Scheduler,
    Shape,
    by_name,
)
from diffusion_engines.runtime.sampling import (
    Settings,
    initial_latents,
    make_scheduler,
    sample,
)
from tests.conftest import IMAGE, STATIC


def shapes(config: Mapping[str, Any], image: Image, dynamic: Dynamic) -> tuple[Shape, ...]:
    return ((image.batch_size, config["channels"], 4, 4), (1,), (image.batch_size, 3))


def component(name: str, role: Any, *takes: Input) -> Component:
    adapter = "diffusion_engines.serve.adapters:UNet"
    return Component(
        name, role, name, "diffusers", "UNet2DModel", takes, ("x",), shapes, torch.add, adapter
    )


def encode(
    networks: Networks,
    model: Model,
    prompts: Sequence[str],
    negative_prompt: str | None,
    size: tuple[int, int],
    device: str,
) -> tuple[torch.Tensor, ...]:
    texts = [*([] if negative_prompt is None else [negative_prompt] * len(prompts)), *prompts]
    return (networks["words"](torch.tensor([[float(len(text))] for text in texts])),)


def denoise(networks: Networks, rows: Any, timestep: Any, conditions: Any) -> torch.Tensor:
    return networks["transformer"](rows, timestep[None] / 1000, *conditions)


FAMILY = Family(
    class_name="ToyPipeline",
    components=by_name(
        component("words", "encoder", Input("lengths")),
        component(
            "transformer", "denoiser", Input("latents"), Input("time", "float32"), Input("lengths")
        ),
        component("pixels", "decoder", Input("latents")),
    ),
    tokenizers={},
    encode=encode,
    denoise=denoise,
    decode=lambda networks, model, latents: networks["pixels"](latents).clamp(0, 1),
    latent_channels=lambda configs: int(configs["transformer"]["channels"]),
    pixels_per_latent=lambda configs: 4,
    schedulers={"flow": Scheduler("FlowMatchEulerDiscreteScheduler", {})},
    options=lambda index: {},
)
MODEL = Model(FAMILY, {}, {"transformer": {"channels": 6}}, {}, {})


def test_inputs_are_numbered_and_typed_as_declared() -> None:
    inputs = FAMILY.denoiser.inputs({"channels": 6}, IMAGE, STATIC)
    assert [(i.name, i.role, i.dtype) for i in inputs] == [
        ("input_0", "latents", "component"),
        ("input_1", "time", "float32"),
        ("input_2", "lengths", "component"),
    ]
    assert [o.name for o in FAMILY.denoiser.outputs] == ["output_0"]


def test_a_transformer_of_flow_matching_denoises() -> None:
    times, rows = [], []

    def transformer(latents: Any, time: Any, lengths: Any) -> torch.Tensor:
        times.append(float(time))
        rows.append((len(latents), lengths.flatten().tolist()))
        return latents

    networks: dict[str, Any] = {
        "words": torch.nn.Identity(),
        "transformer": transformer,
        "pixels": lambda latents: latents[:, :3],
    }
    settings = Settings("flow", 2, 3.0, 16, 32, vae_scale_factor=4, negative_prompt="ab")
    noise = initial_latents(MODEL, settings, [5])
    assert noise.shape == (1, 6, 4, 8)
    result = sample(networks, MODEL, settings, ["lemon"], noise)
    assert result.images.shape == (1, 3, 4, 8)
    assert rows == [(2, [2.0, 5.0])] * 2  # the unconditional row first
    assert times[0] == 1.0 > times[1] > 0
    # dx/dt = x from 1 to 0 in Euler's steps, from noise that nothing scales.
    expected = noise * (1 + times[1] - 1) * (1 - times[1])
    torch.testing.assert_close(result.latents[-1], expected)
    assert len(result.durations.denoiser) == 2


def test_a_scheduler_that_the_family_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="a ToyPipeline has no lms") as raised:
        make_scheduler(FAMILY, "lms", {})
    assert "expected: flow" in str(raised.value)
