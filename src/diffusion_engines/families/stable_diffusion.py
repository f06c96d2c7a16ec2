"""Stable Diffusion 1 and 2: one text encoder, a UNet, a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_engines.errors import ConfigError
from diffusion_engines.families import parts
from diffusion_engines.families.base import (
    Component,
    Family,
    Input,
    Model,
    Networks,
    Shape,
    by_name,
)

if TYPE_CHECKING:
    import torch

    from diffusion_engines.config import Dynamic, Image


def _last_hidden_state(network: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return (batch, 77, hidden)."""
    return network(input_ids=input_ids, return_dict=False)[0]


def unet_shapes(config: Mapping[str, Any], image: Image, dynamic: Dynamic) -> tuple[Shape, ...]:
    """Return the shapes of latents, timestep and text embeddings."""
    batch = parts.batch_dim(image, dynamic, parts.guided_rows(image))
    # Each down-sampling halves an edge; a rest would make up- and down-path disagree.
    step = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = parts.latent_edges(image, dynamic, step)
    return (
        (batch, config["in_channels"], height, width),
        (1,),
        (batch, parts.TOKENS, config["cross_attention_dim"]),
    )


def _noise(
    network: Any, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Return the noise (batch, 4, h, w); the timestep is one for all rows."""
    return network(latents, timestep.expand(latents.shape[0]), text, return_dict=False)[0]


UNET_INPUTS = (
    Input("latents"),
    # fp32 in every precision: schedulers such as LMS have fractional timesteps, and fp16 holds no
    # fraction near 1000. The network computes its sinusoids in fp32 anyway.
    Input("timestep", "float32"),
    Input("text embeddings"),
)
UNET = Component(
    "unet",
    "denoiser",
    "unet",
    "diffusers",
    "UNet2DConditionModel",
    takes=UNET_INPUTS,
    gives=("noise",),
    shapes=unet_shapes,
    call=_noise,
    adapter="diffusion_engines.serve.adapters:UNet",
)


def _encode(
    networks: Networks,
    model: Model,
    prompts: Sequence[str],
    negative_prompt: str | None,
    size: tuple[int, int],
    device: str,
) -> tuple[torch.Tensor, ...]:
    conditions = parts.clip_conditions(networks, model, prompts, device)
    if negative_prompt is None:
        return conditions
    # One call per half, as diffusers does: an engine's batch is the number of images.
    negative = parts.clip_conditions(networks, model, [negative_prompt] * len(prompts), device)
    return parts.both_halves(negative, conditions)


def denoise(
    networks: Networks,
    rows: torch.Tensor,
    timestep: torch.Tensor,
    conditions: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Return the UNet's noise, as of :class:`~diffusion_engines.families.base.Family`."""
    return networks["unet"](rows, timestep.reshape(1).float(), *conditions)


def check_unet(config: Mapping[str, Any], class_name: str, addition_embed_type: str | None) -> None:
    """Check that a UNet takes the conditions that engines of its family have inputs for.

    Raises:
        ConfigError: it takes others.
    """
    expected = {
        # https://arxiv.org/abs/2310.04378: guidance as an embedding beside the timestep
        "time_cond_proj_dim": None,
        "addition_embed_type": addition_embed_type,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "in_channels": config["out_channels"],
    }
    if wrong := [key for key, value in expected.items() if config[key] != value]:
        raise ConfigError(
            f"the UNet takes conditions that engines of a {class_name} have no input for",
            expected=", ".join(f"{key} {expected[key]}" for key in wrong),
            found=", ".join(f"{key} {config[key]}" for key in wrong),
            fix="engines are for text to image: inpainting, depth and the like have other UNets;\n"
            "of a distilled latent consistency model (time_cond_proj_dim), take the LoRA of that\n"
            "name with the model that it was made from, and the scheduler lcm",
        )


_CLASS = "StableDiffusionPipeline"


def _check(configs: Mapping[str, Mapping[str, Any]]) -> None:
    check_unet(configs["unet"], _CLASS, addition_embed_type=None)


def _options(index: Mapping[str, Any]) -> dict[str, Any]:
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


FAMILY = Family(
    class_name=_CLASS,
    components=by_name(
        parts.clip_encoder(
            "text_encoder",
            "CLIPTextModel",
            _last_hidden_state,
            ("hidden state",),
            "diffusion_engines.serve.adapters:TextEncoder",
        ),
        UNET,
        parts.VAE_DECODER,
    ),
    tokenizers={"text_encoder": "tokenizer"},
    encode=_encode,
    denoise=denoise,
    decode=parts.decode,
    check=_check,
    latent_channels=parts.latent_channels,
    pixels_per_latent=parts.pixels_per_latent,
    schedulers=parts.SCHEDULERS,
    options=_options,
    lora=parts.unet_loras("text_encoder"),
    skips=("text_encoder",),
    around_loop=parts.AROUND_LOOP,
)
