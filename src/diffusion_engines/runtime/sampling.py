"""What diffusers' pipelines do, over any mix of PyTorch modules and engines."""

from __future__ import annotations

import functools
import importlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.errors import ConfigError
from diffusion_engines.families import family_of
from diffusion_engines.families.base import SCHEDULER_CONFIG, Family, Model, Network
from diffusion_engines.families.noise_schedules import changed_by
from diffusion_engines.files import read_json
from diffusion_engines.progress import progress
from diffusion_engines.runtime.denoising import (
    Denoised,
    Denoiser,
    Stopwatch,
    denoise,
    draw_noise,
    guided,
)
from diffusion_engines.runtime.networks import read_config
from diffusion_engines.runtime.schedules import schedule_of


@dataclass(frozen=True)
class Settings:
    """One sampling run; ``height`` and ``width`` in pixels, ``guidance_scale`` 1 is none.

    ``guidance`` says whether the denoiser gets both halves of classifier-free guidance, for which
    its engine is built, at any scale.

    Raises:
        ConfigError: a guidance scale is asked for without the half that it takes.
    """

    scheduler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    vae_scale_factor: int = 8
    negative_prompt: str = ""
    guidance: bool = True

    def __post_init__(self) -> None:
        if self.guidance_scale > 1.0 and not self.guidance:
            raise ConfigError(
                "guidance_scale: the model's engines are built without classifier-free guidance",
                expected="1.0",
                found=str(self.guidance_scale),
                fix="set it to 1.0; or image.guidance=true (conf/model/), which doubles the work",
            )


@dataclass
class Durations:
    """Seconds of each phase of one run, in the breakdown of the PhotoRoom article.

    ``denoising_loop`` contains ``denoiser`` (one entry per step) and the scheduler with the
    guidance. On a GPU, the entries are of its own clock: no step waits for another to be timed.
    Where a step is one CUDA graph (:mod:`~diffusion_engines.runtime.denoising`), they are of whole
    steps, with scheduler and guidance.
    """

    encoding: float = 0.0
    denoising_loop: float = 0.0
    denoiser: list[float] = field(default_factory=list)
    decoding: float = 0.0

    @property
    def scheduler_and_guidance(self) -> float:
        """The part of the denoising loop that is not in the entries of the denoiser."""
        return self.denoising_loop - sum(self.denoiser)

    @property
    def total(self) -> float:
        """From prompt to image tensor."""
        return self.encoding + self.denoising_loop + self.decoding


@dataclass(frozen=True)
class Sample:
    """Images (batch, 3, height, width), fp32 in [0, 1], and how they came about.

    ``latents`` are those before the first step and after each step, fp32, on the CPU; none where
    they were not asked for.
    """

    images: torch.Tensor
    latents: list[torch.Tensor]
    durations: Durations


def load_model(weights: Path) -> Model:
    """Read a diffusers folder but for its weights: tokenizers, noise schedule, configs.

    Raises:
        WeightsError, ConfigError: as of ``family_of``.
    """
    family = family_of(weights)
    index = read_json(weights / "model_index.json")
    transformers: Any = importlib.import_module("transformers")
    return Model(
        family=family,
        index=index,
        configs={
            name: read_config(component, weights / component.folder)
            for name, component in family.components.items()
        },
        tokenizers={
            encoder: getattr(transformers, index[folder][1]).from_pretrained(weights / folder)
            for encoder, folder in family.tokenizers.items()
        },
        scheduler_config=read_json(weights / SCHEDULER_CONFIG),
    )


def make_scheduler(family: Family, name: str, config: Mapping[str, Any]) -> Any:
    """Return a diffusers scheduler with the noise schedule that a model was trained with.

    What the denoiser predicts (``prediction_type``) and which timesteps are used
    (``timestep_spacing``) come from the model's config, too.

    Raises:
        ConfigError: the family has no such scheduler, or it would pass over what the model's config
            says of the training.
    """
    import diffusers

    if name not in family.schedulers:
        raise ConfigError(
            f"scheduler: a {family.class_name} has no {name}",
            expected=", ".join(family.schedulers),
            found=name,
            fix="choose one of these (conf/reference/, conf/benchmark/, conf/generate/)",
        )
    scheduler = family.schedulers[name]
    if changed := changed_by(scheduler, config):
        able = [
            other for other, value in family.schedulers.items() if not changed_by(value, config)
        ]
        raise ConfigError(
            f"scheduler: {name} would not keep to the noise schedule of the model",
            expected=", ".join(f"{key} {wanted}" for key, (wanted, _) in changed.items()),
            found=", ".join(f"{key} {found}" for key, (_, found) in changed.items()),
            fix=f"choose {' or '.join(able)} (conf/reference/, conf/benchmark/, conf/generate/)",
        )
    return getattr(diffusers, scheduler.class_name).from_config(config, **scheduler.options)


def _check_steps(family: Family, settings: Settings, config: Mapping[str, Any]) -> None:
    scheduler = family.schedulers[settings.scheduler]
    if problem := scheduler.problem(settings.steps, config):
        raise ConfigError(
            f"steps: {problem}",
            found=str(settings.steps),
            fix="ask for as many, or choose another scheduler",
        )


def initial_latents(model: Model, settings: Settings, seeds: list[int]) -> torch.Tensor:
    """Return Gaussian noise (len(seeds), channels, h, w), fp32, drawn on the CPU.

    Each image has a generator of its own, and it is the CPU's on every device, so that a seed
    means the same picture in every batch and everywhere.
    """
    factor = settings.vae_scale_factor
    channels = model.family.latent_channels(model.configs)
    shape = (channels, settings.height // factor, settings.width // factor)
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
    seeds: Sequence[int] | None = None,
    device: str = "cpu",
    description: str = "denoise",
    trajectory: bool = True,
) -> Sample:
    """Run encoders, denoising loop and decoder, as diffusers' pipelines do.

    Latents stay in fp32 between the steps; each network casts to the precision that it takes.

    Args:
        networks: the components of the model's family, by name.
        model: tokenizers, noise schedule, configs.
        settings: scheduler, steps, guidance, size.
        prompts: as many as ``latents`` has rows.
        latents: standard normal noise (batch, channels, h, w), as of :func:`initial_latents`.
        seeds: of the images, as for the latents: schedulers that add noise draw it from the same
            generators.
        device: where the networks expect their inputs.
        description: shown on the progress bar.
        trajectory: whether to return the latents of every step.

    Raises:
        ConfigError: the scheduler adds noise, and there are no seeds to draw it from; or the
            family has no such scheduler, or it takes no such number of steps.
    """
    family = model.family
    scheduler = make_scheduler(family, settings.scheduler, model.scheduler_config)
    _check_steps(family, settings, model.scheduler_config)
    schedule = schedule_of(scheduler, settings.steps)
    denoiser = functools.partial(family.denoise, networks)
    guidance_scale = settings.guidance_scale if settings.guidance else None
    durations = Durations()
    now = _clock(device)

    started = now()
    negative = settings.negative_prompt if settings.guidance else None
    size = (settings.height, settings.width)
    conditions = family.encode(networks, model, prompts, negative, size, device)
    durations.encoding = now() - started

    started = now()
    generators = _generators(family, settings, seeds, latents)
    latents = latents.to(device)
    if schedule is None:
        denoised = _denoise_with(
            scheduler,
            denoiser,
            latents,
            conditions,
            guidance_scale=guidance_scale,
            generators=generators,
            steps=settings.steps,
            description=description,
            trajectory=trajectory,
        )
    else:
        denoised = denoise(
            denoiser,
            networks[family.denoiser.name],
            schedule,
            latents * schedule.init_noise_sigma,
            conditions,
            guidance_scale=guidance_scale,
            noise=draw_noise(schedule, latents, generators),
            steps=progress(range(len(schedule)), description),
            trajectory=trajectory,
        )
    durations.denoising_loop = now() - started
    durations.denoiser = denoised.stopwatch.seconds()

    started = now()
    images = family.decode(networks, model, denoised.latents)
    durations.decoding = now() - started
    return Sample(images.cpu(), denoised.trajectory, durations)


def _denoise_with(
    scheduler: Any,
    denoiser: Denoiser,
    latents: torch.Tensor,
    conditions: tuple[torch.Tensor, ...],
    *,
    guidance_scale: float | None,
    generators: list[torch.Generator] | None,
    steps: int,
    description: str,
    trajectory: bool,
) -> Denoised:
    """Run the loop with a scheduler whose steps are no sums, as it stands in diffusers."""
    scheduler.set_timesteps(steps, device=latents.device)
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if generators and "generator" in takes else {}
    # Schedulers of flow matching neither scale the noise nor what the denoiser gets.
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    scales = hasattr(scheduler, "scale_model_input")
    scale = (
        None if guidance_scale is None else torch.tensor([guidance_scale], device=latents.device)
    )
    stopwatch = Stopwatch(latents.device)
    collected = [latents.float()]
    for timestep in progress(scheduler.timesteps, description):
        rows = latents if scale is None else torch.cat([latents, latents])
        if scales:
            rows = scheduler.scale_model_input(rows, timestep)
        stopwatch.mark()
        output = denoiser(rows, timestep, conditions)
        stopwatch.mark()
        output = output.float()
        if scale is not None:
            output = guided(output, scale)
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
        if trajectory:
            collected.append(latents.float())
    return Denoised(latents, [*torch.stack(collected).cpu()] if trajectory else [], stopwatch)


def _generators(
    family: Family,
    settings: Settings,
    seeds: Sequence[int] | None,
    latents: torch.Tensor,
) -> list[torch.Generator] | None:
    """Return the generator of each image, which has drawn the image's initial noise.

    It is the CPU's on every device; so an image repeats in any batch and anywhere, and is the one
    that a diffusers pipeline makes with that generator.
    """
    if seeds is None:
        if family.schedulers[settings.scheduler].adds_noise:
            raise ConfigError(
                f"the scheduler {settings.scheduler} adds noise, which needs the images' seeds"
            )
        return None
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:
        torch.randn(latents.shape[1:], generator=generator)
    return generators


def _clock(device: str) -> Callable[[], float]:
    """A clock that waits for the GPU, so that each phase is charged with its own work."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized
