"""What several families have in common, for them to declare: CLIP, latents and their decoder.

Everything here imports torch and diffusers where it is called, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from diffusion_engines.families.base import (
    Component,
    Configs,
    Dim,
    Fit,
    Input,
    Keys,
    LoraFormat,
    Model,
    Networks,
    Only,
    Scheduler,
    Shape,
    outputs_of,
)

if TYPE_CHECKING:
    import torch

    from diffusion_engines.config import Dynamic, Image

# CLIP's context length; every text encoder of the Stable Diffusion family has it.
TOKENS = 77


def _pndm_steps(config: Mapping[str, Any]) -> range:
    """It starts with four Runge-Kutta steps, unless a model's config skips them."""
    first = 1 if config.get("skip_prk_steps", False) else 4
    return range(first, config.get("num_train_timesteps", 1000))


def _lcm_steps(config: Mapping[str, Any]) -> range:
    """Some of those that the model was distilled from."""
    return range(1, config.get("original_inference_steps", 50) + 1)


SCHEDULERS: Mapping[str, Scheduler] = {
    "lms": Scheduler("LMSDiscreteScheduler", {}),
    "pndm": Scheduler("PNDMScheduler", {}, steps=_pndm_steps),
    "euler": Scheduler("EulerDiscreteScheduler", {}),
    "dpmpp_2m": Scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "ddim": Scheduler("DDIMScheduler", {}),
    "euler_ancestral": Scheduler("EulerAncestralDiscreteScheduler", {}, adds_noise=True),
    "lcm": Scheduler("LCMScheduler", {}, adds_noise=True, steps=_lcm_steps),
}

_CLIP_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
CLIP_TOKENIZERS = {"CLIPTokenizer": _CLIP_FILES, "CLIPTokenizerFast": _CLIP_FILES}

# Of CLIPTextConfig, and what diffusers' pipelines look up in it.
CLIP_KEYS = Keys(
    honoured=frozenset(
        {
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "projection_dim",
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_act",
            "layer_norm_eps",
            "eos_token_id",  # where the pooled embedding is taken from
        }
    ),
    only={
        "max_position_embeddings": Only(
            (TOKENS,), f"prompts are {TOKENS} tokens in the inputs of the engines"
        ),
        "model_type": Only(
            ("clip_text_model",), "of another config, which may hold this one, the class reads none"
        ),
        # Diffusers' StableDiffusionPipeline gives such an encoder the mask of the padding.
        "use_attention_mask": Only((False, None), "engines have no input for a mask of the tokens"),
        "return_dict": Only((True, None), "hidden states are read by their names"),
        "output_attentions": Only((False, None), "engines return no attention"),
        "quantization_config": Only((None,), "weights are taken as floating point alone"),
    },
    idle=frozenset(
        {
            # Of training and of what models for other tasks need.
            "attention_dropout",
            "initializer_range",
            "initializer_factor",
            "chunk_size_feed_forward",
            "is_encoder_decoder",
            "problem_type",
            "id2label",
            "label2id",
            # Who wrote the file, and in which dtype; the fleet chooses the precision.
            "architectures",
            "transformers_version",
            "dtype",
            # Of the tokenizer, which has its own.
            "pad_token_id",
            "bos_token_id",
            "output_hidden_states",  # those that are wanted are asked for
        }
    ),
)

# Of the calls of diffusers' pipelines for text to image: prompts, sizes, noise, steps, guidance,
# and the form of the result.
AROUND_LOOP = frozenset(
    {
        "prompt",
        "negative_prompt",
        "prompt_embeds",
        "negative_prompt_embeds",
        "num_images_per_prompt",
        "height",
        "width",
        "latents",
        "generator",
        "num_inference_steps",
        "guidance_scale",
        "output_type",
        "return_dict",
        "callback_on_step_end_tensor_inputs",  # of a callback, which is another argument
    }
)


def open_dim(name: str, size: int, bounds: Sequence[int] | None, step: int = 1) -> int | Dim:
    """Return a fixed size, or an open dimension where there are bounds."""
    return size if bounds is None else Dim(name, size, bounds[0], bounds[1], step)


def batch_dim(image: Image, dynamic: Dynamic, rows: int = 1) -> int | Dim:
    """Return the first dimension of a network that gets so many rows per image."""
    bounds = dynamic.batch_size and [rows * bound for bound in dynamic.batch_size]
    return open_dim("batch", rows * image.batch_size, bounds, rows)


def latent_edges(image: Image, dynamic: Dynamic, step: int = 1) -> tuple[int | Dim, int | Dim]:
    """Return height and width of latents."""
    factor = image.vae_scale_factor

    def edge(name: str, size: int, bounds: Sequence[int] | None) -> int | Dim:
        return open_dim(name, size // factor, bounds and [b // factor for b in bounds], step)

    return (
        edge("height", image.height, dynamic.height),
        edge("width", image.width, dynamic.width),
    )


def guided_rows(image: Image) -> int:
    """Return how many rows per image a denoiser gets in one call.

    Classifier-free guidance runs the unconditional and the conditional half together.
    """
    return 2 if image.guidance else 1


def _token_shapes(config: Mapping[str, Any], image: Image, dynamic: Dynamic) -> tuple[Shape, ...]:
    return ((batch_dim(image, dynamic), TOKENS),)


def clip_encoder(
    name: str, class_name: str, call: Any, gives: tuple[str, ...], adapter: str
) -> Component:
    """Return a text encoder: token ids (batch, 77) in."""
    return Component(
        name,
        "encoder",
        name,
        "transformers",
        class_name,
        takes=(Input("token ids", "int64"),),
        gives=gives,
        shapes=_token_shapes,
        call=call,
        adapter=adapter,
        keys=CLIP_KEYS,
    )


def clip_conditions(
    networks: Networks, model: Model, prompts: Sequence[str], device: str
) -> tuple[torch.Tensor, ...]:
    """Return the hidden states of all encoders, side by side, and the pooled embedding if any.

    Text embeddings are (rows, 77, features), a pooled embedding (rows, features).
    """
    import torch
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    hidden, pooled = [], []
    for encoder, tokenizer in model.tokenizers.items():
        # A word of several vectors is several tokens, which diffusers' pipelines write out too.
        written_out = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
        tokens = tokenizer(
            written_out,
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        first, *rest = outputs_of(networks[encoder](tokens.input_ids.to(device)))
        hidden.append(first)
        pooled += rest
    return (torch.cat(hidden, dim=-1), *pooled)


def both_halves(
    unconditional: tuple[torch.Tensor, ...], conditional: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Return the conditions of classifier-free guidance: the unconditional rows come first."""
    import torch

    return tuple(torch.cat(both) for both in zip(unconditional, conditional, strict=True))


def _decoder_shapes(config: Mapping[str, Any], image: Image, dynamic: Dynamic) -> tuple[Shape, ...]:
    height, width = latent_edges(image, dynamic)
    return ((batch_dim(image, dynamic), config["latent_channels"], height, width),)


def _decoding_half(network: Any) -> None:
    network.encoder = network.quant_conv = None


def _decode_latents(network: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return images (batch, 3, 8 h, 8 w) around [-1, 1] of latents (batch, 4, h, w), unscaled."""
    if network.post_quant_conv is not None:
        latents = network.post_quant_conv(latents)
    return network.decoder(latents)


_THREE = Only((3,), "pictures have three channels")
_NO_SHIFT = Only((None, 0, 0.0), "diffusers' pipelines of this family do not shift latents")
_IGNORED_THERE = Only((None,), "diffusers' StableDiffusionPipeline does not normalize by it")
_FLOATS_ALONE = Only((None,), "weights are taken as floating point alone")

# Of AutoencoderKL.
VAE_KEYS = Keys(
    honoured=frozenset(
        {
            "up_block_types",
            "block_out_channels",
            "layers_per_block",
            "act_fn",
            "latent_channels",
            "norm_num_groups",
            "scaling_factor",
            "use_post_quant_conv",
            "mid_block_add_attention",
        }
    ),
    only={
        "out_channels": _THREE,
        "shift_factor": _NO_SHIFT,
        "latents_mean": _IGNORED_THERE,
        "latents_std": _IGNORED_THERE,
        "quantization_config": _FLOATS_ALONE,
    },
    idle=frozenset(
        {
            # Of the encoding half.
            "in_channels",
            "down_block_types",
            "use_quant_conv",
            "sample_size",  # of training; image.height and image.width say what is built
            "force_upcast",  # the reference is fp32, and the fleet chooses the engine's precision
        }
    ),
)


def _tiny_images(network: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return images (batch, 3, 8 h, 8 w) around [-1, 1] of latents (batch, 4, h, w), unscaled."""
    return network.decoder(latents)


def _tiny_decoding_half(network: Any) -> None:
    network.encoder = None


# TAESD: https://github.com/madebyollin/taesd
_TINY_VAE = Component(
    "vae_decoder",
    "decoder",
    "vae",
    "diffusers",
    "AutoencoderTiny",
    takes=(Input("latents"),),
    gives=("images",),
    shapes=_decoder_shapes,
    call=_tiny_images,
    adapter="diffusion_engines.serve.adapters:VAEDecoder",
    prepare=_tiny_decoding_half,
    keys=Keys(
        honoured=frozenset(
            {
                "decoder_block_out_channels",
                "num_decoder_blocks",
                "act_fn",
                "upsample_fn",
                "latent_channels",
                "scaling_factor",
            }
        ),
        only={
            "out_channels": _THREE,
            "shift_factor": _NO_SHIFT,
            "upsampling_scaling_factor": Only(
                (2,), "diffusers' pipelines take each level of a VAE for a factor of two"
            ),
            "quantization_config": _FLOATS_ALONE,
        },
        idle=frozenset(
            {
                # Of the encoding half.
                "in_channels",
                "encoder_block_out_channels",
                "num_encoder_blocks",
                # Of latents as 8-bit images.
                "latent_magnitude",
                "latent_shift",
                "force_upcast",  # the class itself puts False there
            }
        ),
    ),
    derived=lambda config: {
        "block_out_channels": config["decoder_block_out_channels"],
        "force_upcast": False,
    },
)
VAE_DECODER = Component(
    "vae_decoder",
    "decoder",
    "vae",
    "diffusers",
    "AutoencoderKL",
    takes=(Input("latents"),),
    gives=("images",),
    shapes=_decoder_shapes,
    call=_decode_latents,
    adapter="diffusion_engines.serve.adapters:VAEDecoder",
    prepare=_decoding_half,
    keys=VAE_KEYS,
    variants=(_TINY_VAE,),
)
# Of a family whose pipeline normalizes latents by what was measured of them, channel by channel.
NORMALIZING_VAE_DECODER = replace(
    VAE_DECODER,
    keys=replace(
        VAE_KEYS,
        honoured=VAE_KEYS.honoured | {"latents_mean", "latents_std"},
        only={
            key: only
            for key, only in VAE_KEYS.only.items()
            if key not in ("latents_mean", "latents_std")
        },
    ),
)


def decode(networks: Networks, model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Return images of latents, as of :class:`~diffusion_engines.families.base.Family`.

    Latents are normalized by ``latents_mean`` and ``latents_std`` where the VAE has them, as
    diffusers' StableDiffusionXLPipeline does.
    """
    config = model.configs[VAE_DECODER.name]
    latents = latents / config["scaling_factor"]
    if (std := config.get("latents_std")) is not None:
        mean = config["latents_mean"]
        latents = latents * _by_channel(std, latents) + _by_channel(mean, latents)
    decoded = networks[VAE_DECODER.name](latents).float()
    return (decoded / 2 + 0.5).clamp(0, 1)


def _by_channel(values: Sequence[float], latents: torch.Tensor) -> torch.Tensor:
    return latents.new_tensor(values)[:, None, None]


def text_width(configs: Configs) -> int:
    """Return the features of what the text encoders give, side by side."""
    return sum(int(c["hidden_size"]) for c in configs.values() if "hidden_size" in c)


def _normalized_channels(configs: Configs) -> list[int] | None:
    """Return how many means and standard deviations a VAE has; None: neither."""
    both = [configs[VAE_DECODER.name].get(key) for key in ("latents_mean", "latents_std")]
    if both == [None, None]:
        return None
    return [len(values) if isinstance(values, list) else 0 for values in both]


# What any UNet with CLIP and a VAE have to agree on.
FITS = (
    Fit(
        "in_channels of the UNet",
        lambda configs: configs["unet"]["in_channels"],
        "its out_channels (inpainting and depth models have more)",
        lambda configs: configs["unet"]["out_channels"],
    ),
    Fit(
        "in_channels of the UNet",
        lambda configs: configs["unet"]["in_channels"],
        "latent_channels of the VAE",
        lambda configs: configs[VAE_DECODER.name]["latent_channels"],
    ),
    Fit(
        "cross_attention_dim of the UNet",
        lambda configs: configs["unet"]["cross_attention_dim"],
        "the width of the text embeddings (hidden_size)",
        text_width,
    ),
    Fit(
        "the lengths of latents_mean and latents_std of the VAE",
        _normalized_channels,
        "its latent_channels",
        lambda configs: (
            _normalized_channels(configs) and [configs[VAE_DECODER.name]["latent_channels"]] * 2
        ),
    ),
)


def latent_channels(configs: Configs) -> int:
    """Return the channels of the latents that the VAE decodes."""
    return int(configs[VAE_DECODER.name]["latent_channels"])


def pixels_per_latent(configs: Configs) -> int:
    """Return the factor of the VAE: each of its levels but one halves an edge."""
    return int(2 ** (len(configs[VAE_DECODER.name]["block_out_channels"]) - 1))


def _lora_names(
    tensors: Mapping[str, Any], denoiser: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Read diffusers' names, PEFT's and kohya's, whose block numbers follow from the UNet."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    return StableDiffusionLoraLoaderMixin.lora_state_dict(
        dict(tensors), unet_config=SimpleNamespace(**denoiser)
    )


def unet_loras(*encoders: str) -> LoraFormat:
    """Return the format of LoRAs for a UNet and for text encoders."""
    return LoraFormat(("unet", *encoders), _lora_names)
