"""From prompts to what a UNet is conditioned on: text embeddings and, for SDXL, more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.components import SIZES, STABLE_DIFFUSION_XL, TOKENS, pipeline_of
from diffusion_engines.files import read_json

# One component: tensors in, those of its ComponentSpec; out a tensor, or a tuple of several.
Network = Callable[..., Any]


@dataclass(frozen=True)
class Conditioning:
    """How a model turns prompts into the conditions of its UNet.

    Attributes:
        tokenizers: by the name of the text encoder that takes the tokens, in order.
        sized: whether the UNet also takes a pooled embedding and sizes, as SDXL's does.
        zeros_for_empty_prompt: whether no negative prompt means zeros instead of an empty text.
    """

    tokenizers: Mapping[str, Any]
    sized: bool
    zeros_for_empty_prompt: bool


def load_conditioning(weights: Path) -> Conditioning:
    """Read tokenizers and what ``model_index.json`` says from a diffusers folder.

    Raises:
        WeightsError, ConfigError: as of ``pipeline_of``.
    """
    from transformers import CLIPTokenizer

    pipeline = pipeline_of(weights)
    sized = pipeline is STABLE_DIFFUSION_XL
    return Conditioning(
        tokenizers={
            encoder: CLIPTokenizer.from_pretrained(weights / folder)
            for encoder, folder in pipeline.tokenizers.items()
        },
        sized=sized,
        # StableDiffusionXLPipeline's own default; StableDiffusionPipeline has no such setting.
        zeros_for_empty_prompt=sized
        and read_json(weights / "model_index.json").get("force_zeros_for_empty_prompt", True),
    )


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """Return the outputs of a network as a tuple, also where there is only one."""
    return result if isinstance(result, tuple) else (result,)


def encode(
    networks: Mapping[str, Network],
    conditioning: Conditioning,
    prompts: list[str],
    negative_prompt: str | None,
    size: tuple[int, int],
    device: str,
) -> tuple[torch.Tensor, ...]:
    """Return the UNet's conditions of all prompts: its inputs after latents and timestep.

    Args:
        networks: the text encoders.
        conditioning: of the model.
        prompts: one per image.
        negative_prompt: of the unconditional half, which comes first; None: there is no such half.
        size: of the images, height and width in pixels.
        device: where the networks expect their inputs.

    Returns:
        Text embeddings (rows, 77, features); of SDXL also the pooled embedding (rows, features)
        and the sizes (rows, 6), fp32: original size, crop at the top left, target size.
    """
    conditions = _encode(networks, conditioning, prompts, device)
    if negative_prompt is not None:
        if not negative_prompt and conditioning.zeros_for_empty_prompt:
            negative = tuple(torch.zeros_like(value) for value in conditions)
        else:
            # One call per half, as diffusers does: an engine's batch is the number of images.
            texts = [negative_prompt] * len(prompts)
            negative = _encode(networks, conditioning, texts, device)
        conditions = tuple(torch.cat(both) for both in zip(negative, conditions, strict=True))
    if not conditioning.sized:
        return conditions
    sizes = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=device)
    return (*conditions, sizes.expand(len(conditions[0]), SIZES).contiguous())


def _encode(
    networks: Mapping[str, Network], conditioning: Conditioning, prompts: list[str], device: str
) -> tuple[torch.Tensor, ...]:
    """Return the hidden states of all encoders, side by side, and the pooled embedding if any."""
    hidden, pooled = [], []
    for encoder, tokenizer in conditioning.tokenizers.items():
        tokens = tokenizer(
            prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        )
        first, *rest = outputs_of(networks[encoder](tokens.input_ids.to(device)))
        hidden.append(first)
        pooled += rest
    return (torch.cat(hidden, dim=-1), *pooled)
