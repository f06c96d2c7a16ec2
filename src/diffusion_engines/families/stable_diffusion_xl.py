"""Stable Diffusion XL: two text encoders, and a UNet that also gets the sizes of the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffusion_engines.families import parts
from diffusion_engines.families.base import (
    Configs,
    Family,
    Fit,
    Input,
    Keys,
    Model,
    Networks,
    Only,
    Shape,
    by_name,
)
from diffusion_engines.families.stable_diffusion import (
    UNET,
    UNET_INPUTS,
    UNET_KEYS,
    denoise,
    unet_shapes,
)

if TYPE_CHECKING:
    import torch

    from diffusion_engines.config import Dynamic, Image

# SDXL's micro-conditioning: original size, crop, target size, each as height and width, in pixels.
# Section 2.2 of https://arxiv.org/abs/2307.01952
SIZES = 6


def _penultimate(network: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the hidden state before the last layer (batch, 77, hidden)."""
    return network(input_ids=input_ids, output_hidden_states=True).hidden_states[-2]


def _penultimate_and_pooled(
    network: Any, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the penultimate hidden state (batch, 77, hidden), the embedding (batch, features)."""
    result = network(input_ids=input_ids, output_hidden_states=True)
    return result.hidden_states[-2], result.text_embeds


def _unet_shapes(config: Mapping[str, Any], image: Image, dynamic: Dynamic) -> tuple[Shape, ...]:
    shapes = unet_shapes(config, image, dynamic)
    batch = shapes[0][0]
    sinusoids = SIZES * config["addition_time_embed_dim"]
    pooled = config["projection_class_embeddings_input_dim"] - sinusoids
    return (*shapes, (batch, pooled), (batch, SIZES))


def _noise(
    network: Any,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    pooled: torch.Tensor,
    sizes: torch.Tensor,
) -> torch.Tensor:
    """Return the noise (batch, 4, h, w); the timestep is one for all rows."""
    batched = timestep.expand(latents.shape[0])
    # The network puts the pooled embedding beside sinusoids of the sizes, which are fp32.
    # PyTorch promotes; the exporter would write a Concat of two types, which is invalid.
    conditions = {"text_embeds": pooled.to(sizes.dtype), "time_ids": sizes}
    return network(latents, batched, text, added_cond_kwargs=conditions, return_dict=False)[0]


def _zeros_for_empty_prompt(index: Mapping[str, Any]) -> bool:
    # The default is StableDiffusionXLPipeline's own.
    return bool(index.get("force_zeros_for_empty_prompt", True))


def _encode(
    networks: Networks,
    model: Model,
    prompts: Sequence[str],
    negative_prompt: str | None,
    size: tuple[int, int],
    device: str,
) -> tuple[torch.Tensor, ...]:
    """Return text embeddings, the pooled embedding, and the sizes (rows, 6), fp32."""
    import torch

    conditions = parts.clip_conditions(networks, model, prompts, device)
    if negative_prompt is not None:
        if not negative_prompt and _zeros_for_empty_prompt(model.index):
            negative = tuple(torch.zeros_like(value) for value in conditions)
        else:
            texts = [negative_prompt] * len(prompts)
            negative = parts.clip_conditions(networks, model, texts, device)
        conditions = parts.both_halves(negative, conditions)
    # Nothing is cropped: the original is the target.
    sizes = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=device)
    return (*conditions, sizes.expand(len(conditions[0]), SIZES).contiguous())


_ADDED = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
_UNET_KEYS = Keys(
    honoured=UNET_KEYS.honoured | {*_ADDED},
    only={
        **UNET_KEYS.only,
        "addition_embed_type": Only(
            ("text_time",), "engines of this family give it a pooled text and the sizes"
        ),
    },
    idle=UNET_KEYS.idle - {*_ADDED},
)


def _added_features(configs: Configs) -> int:
    """Return the features of the added conditions: the pooled embedding and the sinusoids."""
    sinusoids = SIZES * int(configs["unet"]["addition_time_embed_dim"] or 0)
    return int(configs["text_encoder_2"]["projection_dim"] or 0) + sinusoids


def _options(index: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "force_zeros_for_empty_prompt": _zeros_for_empty_prompt(index),
        "add_watermarker": False,
    }


# The second encoder's prompts, and the sizes that the UNet is told.
_AROUND_LOOP = {
    "prompt_2",
    "negative_prompt_2",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
}
_ADAPTER = "diffusion_engines.serve.adapters:PenultimateTextEncoder"

FAMILY = Family(
    class_name="StableDiffusionXLPipeline",
    components=by_name(
        parts.clip_encoder(
            "text_encoder", "CLIPTextModel", _penultimate, ("hidden state",), _ADAPTER
        ),
        parts.clip_encoder(
            "text_encoder_2",
            "CLIPTextModelWithProjection",
            _penultimate_and_pooled,
            ("hidden state", "pooled embedding"),
            _ADAPTER,
        ),
        replace(
            UNET,
            takes=(
                *UNET_INPUTS,
                Input("pooled embedding"),
                # fp32 as the timestep: fp16 skips integers from 2048 on.
                Input("sizes", "float32"),
            ),
            shapes=_unet_shapes,
            call=_noise,
            keys=_UNET_KEYS,
        ),
        parts.NORMALIZING_VAE_DECODER,
    ),
    tokenizers={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    encode=_encode,
    denoise=denoise,
    decode=parts.decode,
    latent_channels=parts.latent_channels,
    pixels_per_latent=parts.pixels_per_latent,
    schedulers=parts.SCHEDULERS,
    options=_options,
    tokenizer_files=parts.CLIP_TOKENIZERS,
    tokens=parts.TOKENS,
    fits=(
        *parts.FITS,
        Fit(
            "projection_class_embeddings_input_dim of the UNet",
            lambda configs: configs["unet"]["projection_class_embeddings_input_dim"],
            f"projection_dim of text_encoder_2 and {SIZES} times its addition_time_embed_dim",
            _added_features,
        ),
    ),
    keys=Keys(
        honoured=frozenset({"force_zeros_for_empty_prompt"}),
        only={},
        idle=frozenset(
            {
                "add_watermarker",  # an invisible one; no picture made here has it
                # Of IP-Adapter, which engines have no input for.
                "image_encoder",
                "feature_extractor",
            }
        ),
    ),
    lora=parts.unet_loras("text_encoder", "text_encoder_2"),
    around_loop=parts.AROUND_LOOP | _AROUND_LOOP,
)
