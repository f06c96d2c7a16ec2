"""What several families have in common, for them to declare: CLIP, latents and their decoder.

Everything here imports torch and diffusers where it is called, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from diffusion_engines.families.base import (
    Component,
    Dim,
    Input,
    LoraFormat,
    Model,
    Networks,
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
    )


def clip_conditions(
    networks: Networks, model: Model, prompts: Sequence[str], device: str
) -> tuple[torch.Tensor, ...]:
    """Return the hidden states of all encoders, side by side, and the pooled embedding if any.

    Text embeddings are (rows, 77, features), a pooled embedding (rows, features).
    """
    import torch

    hidden, pooled = [], []
    for encoder, tokenizer in model.tokenizers.items():
        tokens = tokenizer(
            list(prompts),
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
)


def decode(networks: Networks, model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Return images of latents, as of :class:`~diffusion_engines.families.base.Family`."""
    scale = model.configs[VAE_DECODER.name]["scaling_factor"]
    decoded = networks[VAE_DECODER.name](latents / scale).float()
    return (decoded / 2 + 0.5).clamp(0, 1)


def latent_channels(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the channels of the latents that the VAE decodes."""
    return int(configs[VAE_DECODER.name]["latent_channels"])


def pixels_per_latent(configs: Mapping[str, Mapping[str, Any]]) -> int:
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
