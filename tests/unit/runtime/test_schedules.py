"""A schedule's numbers are diffusers' own, and what is no sum has none."""

from __future__ import annotations

import json
import time
from typing import Any

import diffusers
import pytest
import torch

from diffusion_engines.families.parts import SCHEDULERS
from diffusion_engines.runtime import schedules
from diffusion_engines.runtime.schedules import schedule_of
from tests.conftest import ROOT

CONFIGS = {
    **{name: ROOT / f"conf/architecture/{name}" for name in ("sd14", "sd21", "sdxl", "sdxl-turbo")},
    "lemon": ROOT / "models/lemon",
}


def config_of(model: str) -> dict[str, Any]:
    return json.loads((CONFIGS[model] / "scheduler/scheduler_config.json").read_text())


def make(name: str, model: str = "sd14", **changes: Any) -> Any:
    spec = SCHEDULERS[name]
    config = config_of(model) | {"set_alpha_to_one": False} | dict(spec.options) | changes
    return getattr(diffusers, spec.class_name).from_config(config)


@pytest.mark.filterwarnings("ignore:`prediction_type`")
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_every_model_is_a_sum(name: str, model: str) -> None:
    for prediction in ("epsilon", "v_prediction"):
        scheduler = make(name, model, prediction_type=prediction)
        for steps in (4, 20):
            schedule = schedule_of(scheduler, steps)
            assert schedule is not None
            scheduler.set_timesteps(steps)
            assert torch.equal(schedule.timesteps, scheduler.timesteps.float())
            assert schedule.init_noise_sigma == float(scheduler.init_noise_sigma)
            assert any(schedule.draws) == SCHEDULERS[name].adds_noise
            assert schedule.samples.shape == schedule.outputs.shape
            assert schedule.table(16).shape == (len(schedule), 35)


def test_the_factors_are_those_of_the_papers() -> None:
    """Euler and DDIM are short enough to be written down here."""
    scheduler = make("euler")
    schedule = schedule_of(scheduler, 5)
    assert schedule is not None
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.double()
    assert schedule.memory == 1
    torch.testing.assert_close(schedule.samples[:, 0], torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(schedule.outputs[:, 0], sigmas.diff(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.input_scales, (sigmas[:-1] ** 2 + 1) ** -0.5)
    assert not schedule.noise.any()

    scheduler = make("ddim")
    schedule = schedule_of(scheduler, 5)
    assert schedule is not None
    scheduler.set_timesteps(5)
    now = scheduler.alphas_cumprod[scheduler.timesteps].double()
    then = torch.cat([now[1:], scheduler.final_alpha_cumprod.double()[None]])
    expected = (then / now) ** 0.5
    torch.testing.assert_close(schedule.samples[:, 0], expected, rtol=1e-6, atol=0)
    expected = (1 - then) ** 0.5 - expected * (1 - now) ** 0.5
    torch.testing.assert_close(schedule.outputs[:, 0], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(schedule.input_scales, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "memory"), [("euler", 1), ("dpmpp_2m", 2), ("lms", 4), ("pndm", 5)]
)
def test_no_more_of_the_past_is_kept_than_a_solver_needs(name: str, memory: int) -> None:
    schedule = schedule_of(make(name), 20)
    assert schedule is not None
    assert schedule.memory == memory
    with_runge_kutta = schedule_of(make("pndm", "lemon"), 20)
    assert with_runge_kutta is not None
    assert with_runge_kutta.memory == 13


def test_the_rings_of_a_table_hold_each_factor_where_its_value_is() -> None:
    schedule = schedule_of(make("lms"), 9)
    assert schedule is not None
    rings = schedule.table(5)[:, 2:-1].reshape(9, 2, 5)
    for step in range(9):
        for back in range(4):
            assert rings[step, 1, (step - back) % 5] == schedule.outputs[step, back].float()
    assert (rings[:, 1] != 0).sum() == (schedule.outputs != 0).sum()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ddim", {"clip_sample": True}),
        ("ddim", {"clip_sample": True, "clip_sample_range": 50.0}),
        ("ddim", {"thresholding": True}),
        ("dpmpp_2m", {"thresholding": True, "sample_max_value": 3.0}),
        ("lcm", {"clip_sample": True}),
    ],
)
def test_what_clips_is_no_sum(name: str, changes: dict[str, Any]) -> None:
    assert schedule_of(make(name), 4) is not None
    assert schedule_of(make(name, **changes), 4) is None


def test_an_unknown_class_is_tried_and_not_trusted() -> None:
    ddim: Any = diffusers.DDIMScheduler
    euler_ancestral: Any = diffusers.EulerAncestralDiscreteScheduler

    class Squares(ddim):
        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            result = super().step(model_output, timestep, sample, **options)
            result.prev_sample = result.prev_sample + 1e-3 * model_output**2
            return result

    class Offset(ddim):
        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            result = super().step(model_output, timestep, sample, **options)
            result.prev_sample = result.prev_sample + 0.5
            return result

    class Twice(euler_ancestral):
        def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None) -> Any:
            torch.randn(sample.shape, generator=generator)
            return super().step(model_output, timestep, sample, generator)

    cls: Any
    for cls in (Squares, Offset, Twice):
        assert schedule_of(cls.from_config(config_of("sd21")), 4) is None
    assert schedule_of(object(), 4) is None
    # Its corrector carries every earlier step along.
    assert schedule_of(diffusers.UniPCMultistepScheduler.from_config(config_of("sd21")), 30) is None


def test_a_scheduler_that_is_not_what_its_config_says_has_no_table() -> None:
    scheduler = make("ddim")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    assert schedule_of(scheduler, 4) is None


def test_the_callers_scheduler_and_random_numbers_stay_as_they_are() -> None:
    scheduler = make("euler_ancestral")
    scheduler.set_timesteps(7)
    before, state = dict(vars(scheduler)), torch.get_rng_state()
    assert schedule_of(scheduler, 12) is not None
    assert vars(scheduler) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hundred_steps_are_read_once_and_at_once() -> None:
    schedules._schedule.cache_clear()
    started = time.process_time()
    first = schedule_of(make("lms"), 100)
    assert time.process_time() - started < 2.0  # 0.2 s on an idle machine
    assert schedule_of(make("lms"), 100) is first
    assert schedule_of(make("lms"), 99) is not first
