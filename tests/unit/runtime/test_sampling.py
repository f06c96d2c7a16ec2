"""The denoising loop is diffusers' own, and recordings give back what happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion_engines.config import SCHEDULERS
from diffusion_engines.errors import ConfigError
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.runtime import sampling
from diffusion_engines.runtime.assemble import torch_networks
from diffusion_engines.runtime.calls import recorded_calls
from diffusion_engines.runtime.recording import load_settings, prompt_batches, record_reference
from diffusion_engines.runtime.schedules import schedule_of

PROMPT = "A big banana leaf with lemons in front of it"
SETTINGS = sampling.Settings("lms", 4, 7.5, 128, 128, negative_prompt="blurry")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_images_are_those_of_diffusers(tiny_weights: Path, scheduler: str) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_weights, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    model = sampling.load_model(tiny_weights)
    settings = sampling.Settings(scheduler, 4, 7.5, 128, 128, negative_prompt="blurry")
    pipeline.scheduler = sampling.make_scheduler(model.family, scheduler, model.scheduler_config)
    noise = sampling.initial_latents(model, settings, [3])
    with torch.no_grad():
        expected = pipeline(
            PROMPT,
            negative_prompt="blurry",
            num_inference_steps=4,
            guidance_scale=7.5,
            # Initial noise and that of each step, from one generator.
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
    networks = torch_networks("fp32", "cpu", weights=tiny_weights)
    found = sampling.sample(networks, model, settings, [PROMPT], noise, seeds=[3])
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-4)
    assert len(found.durations.denoiser) >= 4
    assert found.durations.total > found.durations.denoising_loop > sum(found.durations.denoiser)


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        # https://arxiv.org/abs/2305.08891, which these two do not know.
        ({"rescale_betas_zero_snr": True}, "lms", "expected: rescale_betas_zero_snr True"),
        ({"rescale_betas_zero_snr": True}, "pndm", "choose euler or dpmpp_2m or ddim"),
        # Its own defaults are not those of the model's class.
        ({}, "lcm", "beta_schedule scaled_linear"),
    ],
)
def test_a_scheduler_that_passes_over_what_was_trained_is_refused(
    config: dict[str, object], name: str, said: str
) -> None:
    config = {"_class_name": "DDIMScheduler", **config}
    with pytest.raises(ConfigError, match="would not keep to the noise schedule") as raised:
        sampling.make_scheduler(FAMILY, name, config)
    assert said in str(raised.value)
    assert sampling.make_scheduler(FAMILY, "euler", config).config.prediction_type == "epsilon"


def test_a_seed_means_the_same_noise_in_every_batch(tiny_weights: Path) -> None:
    model = sampling.load_model(tiny_weights)
    both = sampling.initial_latents(model, SETTINGS, [1, 2])
    assert torch.equal(both[1:], sampling.initial_latents(model, SETTINGS, [2]))
    assert both.shape == (2, 4, 16, 16)


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "lcm"])
def test_added_noise_is_that_of_the_images_own_seed(tiny_weights: Path, scheduler: str) -> None:
    model = sampling.load_model(tiny_weights)
    networks = torch_networks("fp32", "cpu", weights=tiny_weights)
    settings = sampling.Settings(scheduler, 3, 1.0, 64, 64, guidance=False)

    def images(*seeds: int) -> torch.Tensor:
        noise = sampling.initial_latents(model, settings, list(seeds))
        prompts = ["lemons"] * len(seeds)
        return sampling.sample(networks, model, settings, prompts, noise, seeds=seeds).images

    both = images(1, 2)
    torch.testing.assert_close(both[1:], images(2), rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3
    noise = sampling.initial_latents(model, settings, [1])
    other = sampling.sample(networks, model, settings, ["lemons"], noise, seeds=[2]).images
    assert (other - both[:1]).abs().max() > 1e-3  # the same start, other noise on the way
    with pytest.raises(ConfigError, match="needs the images' seeds"):
        sampling.sample(networks, model, settings, ["lemons"], noise)


def test_guidance_that_is_off_runs_one_half_and_takes_no_scale(tiny_weights: Path) -> None:
    model = sampling.load_model(tiny_weights)
    networks = torch_networks("fp32", "cpu", weights=tiny_weights)
    rows = []

    def unet(latents: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        rows.append(len(latents))
        return networks["unet"](latents, *others)

    found = {}
    for guidance in (True, False):
        settings = sampling.Settings("euler", 2, 1.0, 64, 64, guidance=guidance)
        noise = sampling.initial_latents(model, settings, [0])
        watched = {**networks, "unet": unet}
        found[guidance] = sampling.sample(watched, model, settings, [PROMPT], noise).images
    assert rows == [2, 2, 1, 1]
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"image\.guidance=true"):
        sampling.Settings("euler", 2, 7.5, 64, 64, guidance=False)


def test_nan_is_seen_and_not_painted_black(tiny_weights: Path) -> None:
    model = sampling.load_model(tiny_weights)
    networks = torch_networks("fp32", "cpu", weights=tiny_weights)
    networks["vae_decoder"] = lambda latents: torch.full((1, 3, 128, 128), float("nan"))
    noise = sampling.initial_latents(model, SETTINGS, [0])
    assert sampling.sample(networks, model, SETTINGS, [PROMPT], noise).images.isnan().all()


def test_a_recording_gives_back_the_calls(tiny_weights: Path, tmp_path: Path) -> None:
    networks = torch_networks("fp32", "cpu", weights=tiny_weights)
    model = sampling.load_model(tiny_weights)
    record_reference(
        networks, model, SETTINGS, [PROMPT, "lemons"], tmp_path, seed=5, batch_size=1, frames=3
    )
    calls = recorded_calls(tmp_path / "unet.safetensors")
    assert len(calls) == 2 * 4
    (latents, timestep, text), (output,) = calls[5]
    assert (latents.shape, timestep.shape, text.shape) == ((2, 4, 16, 16), (1,), (2, 77, 32))
    with torch.no_grad():
        torch.testing.assert_close(networks["unet"](latents, timestep, text), output)
    assert len(recorded_calls(tmp_path / "text_encoder.safetensors")) == 4
    assert len(list(tmp_path.glob("frame-*.png"))) == 3
    assert len(list(tmp_path.glob("image-*.png"))) == 2
    assert load_settings(tmp_path) == (SETTINGS, [PROMPT, "lemons"], 5, 1)


def test_batches_are_full() -> None:
    assert prompt_batches(["a", "b", "c"], 7, 2) == [
        (["a", "b"], [7, 8]),
        (["c", "c"], [9, 10]),
    ]


@pytest.mark.parametrize("change", [{"clip_sample": True}, {"thresholding": True}])
def test_a_scheduler_that_clips_takes_its_own_steps(
    tiny_weights: Path, change: dict[str, bool]
) -> None:
    model = sampling.load_model(tiny_weights)
    model = replace(model, scheduler_config={**model.scheduler_config, **change})
    settings = sampling.Settings("ddim", 4, 7.5, 64, 64)
    scheduler = sampling.make_scheduler(model.family, "ddim", model.scheduler_config)
    assert schedule_of(scheduler, 4) is None
    networks = torch_networks("fp32", "cpu", weights=tiny_weights)
    noise = sampling.initial_latents(model, settings, [3])
    found = sampling.sample(networks, model, settings, [PROMPT], noise, seeds=[3])
    assert len(found.latents) == 5
    assert len(found.durations.denoiser) == 4
    scheduler.set_timesteps(4)
    conditions = model.family.encode(networks, model, [PROMPT], "", (64, 64), "cpu")
    latents = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            rows = torch.cat([latents, latents])
            first, second = model.family.denoise(networks, rows, timestep, conditions).chunk(2)
            latents = scheduler.step(first + 7.5 * (second - first), timestep, latents).prev_sample
    torch.testing.assert_close(found.latents[-1], latents, rtol=0, atol=1e-5)


def test_the_latents_of_every_step_are_for_those_who_ask(tiny_weights: Path) -> None:
    model = sampling.load_model(tiny_weights)
    networks = torch_networks("fp32", "cpu", weights=tiny_weights)
    noise = sampling.initial_latents(model, SETTINGS, [0])
    whole = sampling.sample(networks, model, SETTINGS, [PROMPT], noise)
    assert len(whole.latents) == 5
    scheduler = sampling.make_scheduler(model.family, "lms", model.scheduler_config)
    scheduler.set_timesteps(4)
    assert torch.equal(whole.latents[0], noise * float(scheduler.init_noise_sigma))
    alone = sampling.sample(networks, model, SETTINGS, [PROMPT], noise, trajectory=False)
    assert alone.latents == []
    assert torch.equal(alone.images, whole.images)


def test_steps_that_a_scheduler_does_not_take_are_refused_before_any_work(
    tiny_weights: Path,
) -> None:
    model = sampling.load_model(tiny_weights)
    settings = replace(SETTINGS, scheduler="lcm", steps=51)
    noise = sampling.initial_latents(model, settings, [0])
    with pytest.raises(ConfigError, match="steps: LCMScheduler takes 1 to 50") as raised:
        sampling.sample({}, model, settings, [PROMPT], noise, seeds=[0])
    assert raised.value.found == "51"
