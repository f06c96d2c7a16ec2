"""A family for tests: a transformer that is told a class instead of a text, and a VAE.

Copied to ``src/diffusion_engines/families/toy.py`` of a clone. With ``conf/`` it is all that a
family takes. Its pipeline is diffusers' ``DiTPipeline`` (https://arxiv.org/abs/2212.09748), whose
denoiser is no UNet and which encodes nothing; a prompt is the class of its length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def _shapes(config: Mapping[str, Any], image: Image, dynamic: Dynamic) -> tuple[Shape, ...]:
    batch = parts.batch_dim(image, dynamic, parts.guided_rows(image))
    height, width = parts.latent_edges(image, dynamic, config["patch_size"])
    return ((batch, config["in_channels"], height, width), (1,), (batch,))


def _noise(
    network: Any, latents: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    return network(
        latents, timestep.expand(latents.shape[0]), class_labels=labels, return_dict=False
    )[0]


TRANSFORMER = Component(
    "transformer",
    "denoiser",
    "transformer",
    "diffusers",
    "DiTTransformer2DModel",
    takes=(Input("latents"), Input("timestep", "float32"), Input("class labels", "int64")),
    gives=("noise",),
    shapes=_shapes,
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
    import torch

    classes = model.configs["transformer"]["num_embeds_ada_norm"]
    labels = torch.tensor([len(prompt) % classes for prompt in prompts], device=device)
    if negative_prompt is not None:
        labels = torch.cat([torch.full_like(labels, classes), labels])  # the class of no class
    return (labels,)


def _denoise(
    networks: Networks,
    rows: torch.Tensor,
    timestep: torch.Tensor,
    conditions: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    return networks["transformer"](rows, timestep.reshape(1).float(), *conditions)


FAMILY = Family(
    class_name="DiTPipeline",
    components=by_name(TRANSFORMER, parts.VAE_DECODER),
    tokenizers={},
    encode=_encode,
    denoise=_denoise,
    decode=parts.decode,
    latent_channels=parts.latent_channels,
    pixels_per_latent=parts.pixels_per_latent,
    schedulers=parts.SCHEDULERS,
    options=lambda index: {},
)
