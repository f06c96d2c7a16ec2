"""The denoising loop of Stable Diffusion, over any mix of PyTorch modules and engines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.components import TOKENS
from diffusion_engines.progress import progress

# One component: tensors in (those of its ComponentSpec), one tensor out.
Network = Callable[..., torch.Tensor]

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "ddim": ("DDIMScheduler", {}),
}


@dataclass(frozen=True)
class Model:
    """What sampling needs of a diffusers model besides its networks."""

    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    scaling_factor: float
    latent_channels: int


@dataclass(frozen=True)
class Settings:
    """One sampling run; ``height`` and ``width`` in pixels, ``guidance_scale`` 1 is none."""

    scheduler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    vae_scale_factor: int = 8
    negative_prompt: str = ""


@dataclass
class Timings:
    """Seconds of each phase of one run, in the breakdown of the PhotoRoom article.

    ``denoising_loop`` contains ``unet`` (one entry per step) and the scheduler with the guidance.
    """

    text_encoding: float = 0.0
    denoising_loop: float = 0.0
    unet: list[float] = field(default_factory=list)
    vae_decoding: float = 0.0

    @property
    def scheduler_and_guidance(self) -> float:
        """The part of the denoising loop that is not the UNet."""
        return self.denoising_loop - sum(self.unet)

    @property
    def total(self) -> float:
        """From prompt to image tensor."""
        return self.text_encoding + self.denoising_loop + self.vae_decoding


@dataclass(frozen=True)
class Sample:
    """Images (batch, 3, height, width), fp32 in [0, 1], and how they came about.

    ``latents`` are those before the first step and after each step, fp32.
    """

    images: torch.Tensor
    latents: list[torch.Tensor]
    timings: Timings


def load_model(weights: Path) -> Model:
    """Read tokenizer, scheduler and VAE settings from a diffusers folder."""
    from transformers import CLIPTokenizer

    vae = json.loads((weights / "vae" / "config.json").read_text())
    return Model(
        tokenizer=CLIPTokenizer.from_pretrained(weights / "tokenizer"),
        scheduler_config=json.loads((weights / "scheduler" / "scheduler_config.json").read_text()),
        scaling_factor=vae["scaling_factor"],
        latent_channels=vae["latent_channels"],
    )


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Return a diffusers scheduler with the noise schedule that a model was trained with."""
    import diffusers

    class_name, options = _SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **options)


def initial_latents(model: Model, settings: Settings, seeds: list[int]) -> torch.Tensor:
    """Return Gaussian noise (len(seeds), channels, h, w), fp32, drawn on the CPU.

    Each image has a generator of its own, and it is the CPU's on every device, so that a seed
    means the same picture in every batch and everywhere.
    """
    factor = settings.vae_scale_factor
    shape = (model.latent_channels, settings.height // factor, settings.width // factor)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@torch.no_grad()
def sample(
    networks: Mapping[str, Network],
    model: Model,
    settings: Settings,
    prompts: list[str],
    latents: torch.Tensor,
    *,
    device: str = "cpu",
    description: str = "denoise",
) -> Sample:
    """Run text encoder, denoising loop and VAE decoder, as StableDiffusionPipeline does.

    Latents stay in fp32 between the steps; each network casts to the precision that it takes.

    Args:
        networks: ``text_encoder``, ``unet``, ``vae_decoder``; see ``components.py``.
        model: tokenizer, noise schedule, VAE settings.
        settings: scheduler, steps, guidance, size.
        prompts: as many as ``latents`` has rows.
        latents: standard normal noise (batch, channels, h, w), as of :func:`initial_latents`.
        device: where the networks expect their inputs.
        description: shown on the progress bar.
    """
    scheduler = make_scheduler(settings.scheduler, model.scheduler_config)
    scheduler.set_timesteps(settings.steps, device=device)
    timings = Timings()
    guided = settings.guidance_scale > 1.0
    now = _clock(device)

    started = now()
    # One call per half, as diffusers does: an engine's batch is the number of images.
    text = _encode(networks["text_encoder"], model, prompts, device)
    negative = _encode(
        networks["text_encoder"], model, [settings.negative_prompt] * len(prompts), device
    )
    text = torch.cat([negative, text])
    timings.text_encoding = now() - started

    started = now()
    latents = latents.to(device) * scheduler.init_noise_sigma
    trajectory = [latents.float().cpu()]
    for timestep in progress(scheduler.timesteps, description):
        # Without guidance both halves still run: engines have the batch size of two halves.
        doubled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        step_timestep = timestep.reshape(1).to(torch.float32)
        unet_started = now()
        noise = networks["unet"](doubled, step_timestep, text)
        timings.unet.append(now() - unet_started)
        unconditional, conditional = noise.float().chunk(2)
        if guided:
            difference = conditional - unconditional
            conditional = unconditional + settings.guidance_scale * difference
        latents = scheduler.step(conditional, timestep, latents).prev_sample
        trajectory.append(latents.float().cpu())
    timings.denoising_loop = now() - started

    started = now()
    images = decode(networks["vae_decoder"], model, latents)
    timings.vae_decoding = now() - started
    return Sample(images.cpu(), trajectory, timings)


def decode(vae_decoder: Network, model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Return the images (batch, 3, height, width), fp32 in [0, 1], of latents.

    NaN stays NaN, so that a network that overflows is seen and not painted black.
    """
    decoded = vae_decoder(latents / model.scaling_factor).float()
    return (decoded / 2 + 0.5).clamp(0, 1)


def _encode(text_encoder: Network, model: Model, prompts: list[str], device: str) -> torch.Tensor:
    tokens = model.tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    return text_encoder(tokens.input_ids.to(device))


def _clock(device: str) -> Callable[[], float]:
    """A clock that waits for the GPU, so that each phase is charged with its own work."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized
