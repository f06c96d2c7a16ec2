"""Stable Diffusion 1 and 2: one text encoder, a UNet, a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_engines.families import parts
from diffusion_engines.families.base import (
    Component,
    Family,
    Input,
    Keys,
    Model,
    Networks,
    Only,
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
_TEXT_ALONE = "engines of this family have no input for what it asks for"
# Of UNet2DConditionModel.
UNET_KEYS = Keys(
    honoured=frozenset(
        {
            "in_channels",
            "out_channels",
            "center_input_sample",
            "flip_sin_to_cos",
            "freq_shift",
            "down_block_types",
            "mid_block_type",
            "up_block_types",
            "only_cross_attention",
            "block_out_channels",
            "layers_per_block",
            "downsample_padding",
            "mid_block_scale_factor",
            "act_fn",
            "norm_num_groups",
            "norm_eps",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
            "attention_head_dim",
            "dual_cross_attention",
            "use_linear_projection",
            "upcast_attention",
            "resnet_time_scale_shift",
            "resnet_skip_time_act",
            "resnet_out_scale_factor",
            "time_embedding_type",
            "time_embedding_dim",
            "time_embedding_act_fn",
            "timestep_post_act",
            "conv_in_kernel",
            "conv_out_kernel",
            "mid_block_only_cross_attention",
            "cross_attention_norm",
        }
    ),
    only={
        "addition_embed_type": Only((None,), _TEXT_ALONE),
        "class_embed_type": Only((None,), _TEXT_ALONE),
        "num_class_embeds": Only((None,), _TEXT_ALONE),
        "class_embeddings_concat": Only((False,), _TEXT_ALONE),
        "encoder_hid_dim": Only((None,), _TEXT_ALONE),
        "encoder_hid_dim_type": Only((None,), _TEXT_ALONE),
        # https://arxiv.org/abs/2310.04378: guidance as an embedding beside the timestep
        "time_cond_proj_dim": Only(
            (None,),
            "engines have no input for the guidance scale of a distilled latent consistency\n"
            "model: take the LoRA of that name with the model that it was made from, and the "
            "scheduler lcm",
        ),
        # https://arxiv.org/abs/2301.07093: boxes with texts
        "attention_type": Only(("default",), _TEXT_ALONE),
        # https://github.com/huggingface/diffusers/issues/2011: it is named attention_head_dim
        "num_attention_heads": Only((None,), "diffusers takes it from no config"),
        "quantization_config": Only((None,), "weights are taken as floating point alone"),
    },
    idle=frozenset(
        {
            "sample_size",  # of training; image.height and image.width say what is built
            "dropout",
            # Of added conditions, which there are none of.
            "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
            "addition_embed_type_num_heads",
        }
    ),
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
    keys=UNET_KEYS,
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


def _options(index: Mapping[str, Any]) -> dict[str, Any]:
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


FAMILY = Family(
    class_name="StableDiffusionPipeline",
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
    latent_channels=parts.latent_channels,
    pixels_per_latent=parts.pixels_per_latent,
    schedulers=parts.SCHEDULERS,
    options=_options,
    tokenizer_files=parts.CLIP_TOKENIZERS,
    tokens=parts.TOKENS,
    fits=parts.FITS,
    keys=Keys(
        honoured=frozenset(),
        only={},
        idle=frozenset(
            {
                # A classifier that blacks out pictures, and what it needs: left out.
                "safety_checker",
                "feature_extractor",
                "requires_safety_checker",
                "image_encoder",  # of IP-Adapter, which engines have no input for
            }
        ),
    ),
    lora=parts.unet_loras("text_encoder"),
    skips=("text_encoder",),
    around_loop=parts.AROUND_LOOP,
)
