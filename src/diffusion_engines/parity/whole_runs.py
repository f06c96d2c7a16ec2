"""The whole pipeline from the reference's noise: its latents after every step, and its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusion_engines.families.base import Network
from diffusion_engines.layout import Workspace
from diffusion_engines.parity.distances import Difference
from diffusion_engines.parity.metrics import difference, psnr, ssim
from diffusion_engines.runtime.recording import load_settings, prompt_batches
from diffusion_engines.runtime.sampling import load_model, sample


@dataclass(frozen=True)
class Run:
    """One denoising run of every prompt of the reference.

    Attributes:
        prompts: one per image.
        latents: (images, steps + 1, channels, h, w), fp32; those before the first step come first.
        images: (images, 3, height, width), fp32 in [0, 1]; NaN stays NaN.
    """

    prompts: tuple[str, ...]
    latents: torch.Tensor
    images: torch.Tensor


def reference_run(folder: Path) -> Run:
    """Return the run that the stage `reference` recorded in ``folder``."""
    _, prompts, seed, batch_size = load_settings(folder)
    recorded = load_file(folder / "latents.safetensors")
    batches = range(len(prompt_batches(prompts, seed, batch_size)))
    latents = torch.cat([recorded[f"{index}.trajectory"].transpose(0, 1) for index in batches])
    images = load_file(folder / "images.safetensors")["images"]
    return Run(tuple(prompts), latents[: len(prompts)], images)


def run_from_noise(networks: Mapping[str, Network], workspace: Workspace, device: str) -> Run:
    """Sample the prompts of a workspace's reference from its noise.

    Nothing of the reference enters after the noise: what a network gets wrong at one step, all
    later steps start from.
    """
    settings, prompts, seed, batch_size = load_settings(workspace.reference)
    noise = load_file(workspace.reference / "latents.safetensors")
    model = load_model(workspace.weights)
    latents, images = [], []
    for index, (batch, seeds) in enumerate(prompt_batches(prompts, seed, batch_size)):
        start = noise[f"{index}.noise"]
        result = sample(networks, model, settings, batch, start, seeds=seeds, device=device)
        latents.append(torch.stack(result.latents, dim=1))
        images.append(result.images.float())
    count = len(prompts)  # the last batch is filled up
    return Run(tuple(prompts), torch.cat(latents)[:count], torch.cat(images)[:count])


def latent_differences(run: Run, reference: Run) -> list[tuple[Difference, ...]]:
    """Return, for each image, the difference of its latents after every step."""
    return [
        tuple(difference(x, y) for x, y in zip(ours[1:], theirs[1:], strict=True))
        for ours, theirs in zip(run.latents, reference.latents, strict=True)
    ]


def image_differences(run: Run, reference: Run) -> list[dict[str, float]]:
    """Return PSNR in dB and SSIM of each image beside that of the reference."""
    return [{"psnr": psnr(a, b), "ssim": ssim(a, b)} for a, b in image_pairs(run, reference)]


def image_pairs(run: Run, reference: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each image with that of the reference, both (1, 3, height, width)."""
    for ours, theirs in zip(run.images, reference.images, strict=True):
        yield ours[None], theirs[None]
