"""The loop on the device gives the latents of diffusers' schedulers, and waits for nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_engines.families.parts import SCHEDULERS
from diffusion_engines.runtime import denoising
from diffusion_engines.runtime.denoising import denoise, draw_noise, guided
from diffusion_engines.runtime.schedules import Schedule, schedule_of
from tests.unit.runtime.test_schedules import config_of, make

SHAPE = (2, 4, 8, 8)
SEEDS = [3, 8]


class Denoiser(torch.nn.Module):
    """Nonlinear in the latents, and different at every timestep and for every condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, rows: torch.Tensor, timestep: Any, conditions: Any) -> torch.Tensor:
        (bias,) = conditions
        assert len(bias) == len(rows)
        timestep = timestep.reshape(1).float()
        return torch.tanh(2 * self.convolution(rows) + bias + torch.sin(timestep / 50))


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser().requires_grad_(False)


def schedule(name: str, steps: int = 6, **changes: Any) -> Schedule:
    found = schedule_of(make(name, **changes), steps)
    assert found is not None
    return found


def start(scale: float | None = 7.5) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Standard normal latents and conditions."""
    generator = torch.Generator().manual_seed(1)
    rows = SHAPE[0] if scale is None else 2 * SHAPE[0]
    latents = torch.randn(SHAPE, generator=generator)
    return latents, (torch.randn(rows, 4, 1, 1, generator=generator),)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def own_loop(
    scheduler: Any, steps: int, denoiser: Any, scale: float | None, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The loop as it stands in diffusers' pipelines."""
    scheduler.set_timesteps(steps)
    latents, conditions = start(scale)
    latents = latents.to(dtype) * scheduler.init_noise_sigma
    options = (
        {"generator": generators()} if "generator" in scheduler.step.__code__.co_varnames else {}
    )
    trajectory = [latents]
    for timestep in scheduler.timesteps:
        rows = latents if scale is None else torch.cat([latents] * 2)
        rows = scheduler.scale_model_input(rows, timestep)
        output = denoiser(rows.float(), timestep, conditions).to(dtype)
        if scale is not None:
            unconditional, conditional = output.chunk(2)
            output = conditional
            if scale > 1:
                output = unconditional + scale * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
        trajectory.append(latents)
    return trajectory


def our_loop(schedule: Schedule | None, denoiser: Any, scale: float | None) -> denoising.Denoised:
    assert schedule is not None
    latents, conditions = start(scale)
    return denoise(
        denoiser,
        denoiser,
        schedule,
        latents * schedule.init_noise_sigma,
        conditions,
        guidance_scale=scale,
        noise=draw_noise(schedule, latents, generators()),
        trajectory=True,
    )


@pytest.mark.parametrize("scale", [7.5, 1.0, None])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_latents_are_those_of_diffusers_after_every_step(
    denoiser: Denoiser, name: str, prediction: str, scale: float | None
) -> None:
    # LCM is for few steps: of many with guidance, this denoiser makes rounding errors grow.
    counts = (1, 2, 5, 8) if name == "lcm" else (1, 2, 5, 20, 50)
    for model in ("sd14", "sd21", "sdxl"):
        for steps in counts:
            scheduler = make(name, model, prediction_type=prediction)
            found = our_loop(schedule_of(scheduler, steps), denoiser, scale)
            expected = own_loop(scheduler, steps, denoiser, scale, torch.float32)
            assert len(found.trajectory) == len(expected)
            assert torch.equal(found.trajectory[-1], found.latents)
            for ours, theirs in zip(found.trajectory, expected, strict=True):
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_other_schedulers_of_diffusers_need_nothing_new(denoiser: Denoiser, name: str) -> None:
    scheduler = getattr(diffusers, name).from_config(config_of("sdxl"))
    table = schedule_of(scheduler, 10)
    assert table is not None
    assert len(table) == 19  # two calls of the denoiser for most steps
    found = our_loop(table, denoiser, 5.0).trajectory
    for ours, theirs in zip(
        found, own_loop(scheduler, 10, denoiser, 5.0, torch.float32), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_pndm_that_begins_with_runge_kutta(denoiser: Denoiser) -> None:
    scheduler = make("pndm", "lemon")
    table = schedule_of(scheduler, 20)
    assert table is not None
    expected = own_loop(scheduler, 20, denoiser, 5.0, torch.float32)
    for ours, theirs in zip(our_loop(table, denoiser, 5.0).trajectory, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", ["euler_ancestral", "lcm"])
def test_an_images_noise_is_its_own_in_any_batch(denoiser: Denoiser, name: str) -> None:
    table = schedule(name)
    both = draw_noise(table, torch.empty(SHAPE), generators())
    assert both is not None
    for row, generator in enumerate(generators()):
        alone = draw_noise(table, torch.empty(1, *SHAPE[1:]), [generator])
        assert alone is not None
        assert torch.equal(both[:, row : row + 1], alone)
    one = torch.Generator().manual_seed(0)
    shared = draw_noise(table, torch.empty(SHAPE), one)
    again = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert shared is not None
    assert torch.equal(shared[0], again)
    torch.manual_seed(5)
    default = draw_noise(table, torch.empty(SHAPE), None)
    torch.manual_seed(5)
    assert default is not None
    assert torch.equal(default[0], torch.randn(SHAPE))
    assert draw_noise(schedule("euler"), torch.empty(SHAPE), generators()) is None


class NoTransfer(TorchDispatchMode):
    """Fails on what makes a host wait for a device, or brings data from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.append(name)
        moves = name == "_to_copy" and (kwargs or {}).get("device") is not None
        assert not moves, f"{name} to {kwargs}"
        waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}
        assert name not in waits, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [7.5, None])
def test_a_step_neither_waits_nor_moves_anything(denoiser: Denoiser, scale: float | None) -> None:
    latents, conditions = start(scale)
    table = schedule("lms")
    state = denoising._allocate(latents, conditions, scale, rows=len(table), memory=5)
    denoising._load(state, table, latents, conditions, scale)
    with NoTransfer() as mode:
        for _ in range(3):
            denoising._step(denoiser, state)
    assert mode.seen.count("index_select") == 3
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoTransfer():
        float(state.latents.sum())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps that are kept, with a Python call where a GPU would have a CUDA graph."""
    made: list[Any] = []

    class Graph:
        def __init__(self, step: Callable[[], None]) -> None:
            self.replay = step
            made.append(self)

    def graph(denoiser: Any, state: Any) -> Graph:
        for _ in range(4):  # leaves the state as a capture does: some steps on
            denoising._step(denoiser, state)
        return Graph(lambda: denoising._step(denoiser, state))

    monkeypatch.setattr(denoising, "_graph", graph)
    monkeypatch.setattr(denoising, "_captures", lambda network, device: True)
    return made


def test_a_kept_step_serves_other_steps_schedulers_scales_and_prompts(graphs: list[Any]) -> None:
    denoiser = Denoiser().requires_grad_(False)
    for name, prediction in [("lms", "epsilon"), ("pndm", "epsilon"), ("lcm", "v_prediction")]:
        for steps, scale in [(7, 7.5), (3, 1.0), (1, 2.0)]:
            scheduler = make(name, prediction_type=prediction)
            found = our_loop(schedule_of(scheduler, steps), denoiser, scale)
            expected = own_loop(scheduler, steps, denoiser, scale, torch.float32)
            for ours, theirs in zip(found.trajectory, expected, strict=True):
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
            assert len(found.stopwatch.seconds()) == len(expected) - 1
    assert len(graphs) == 1
    our_loop(schedule("euler"), denoiser, None)
    assert len(graphs) == 2  # other rows, another step
    our_loop(schedule("pndm", 20, skip_prk_steps=False), denoiser, None)
    assert len(graphs) == 3  # a longer memory


def test_a_nan_does_not_outlive_its_run(graphs: list[Any]) -> None:
    denoiser = Denoiser().requires_grad_(False)
    table = schedule("lms")
    latents, conditions = start()

    def run(latents: torch.Tensor) -> torch.Tensor:
        return denoise(denoiser, denoiser, table, latents, conditions, guidance_scale=5.0).latents

    good = run(latents)
    assert run(torch.full_like(latents, torch.nan)).isnan().all()
    assert torch.equal(run(latents), good)
    assert len(graphs) == 1


def test_few_steps_are_kept_and_none_longer_than_its_network(graphs: list[Any]) -> None:
    denoiser = Denoiser().requires_grad_(False)
    table = schedule("euler")
    for edge in range(8, 16):
        latents, bias = torch.randn(1, 4, edge, edge), torch.zeros(2, 4, 1, 1)
        for _ in range(2):
            denoise(denoiser, denoiser, table, latents, (bias,), guidance_scale=5.0)
    assert len(graphs) == 8
    kept = denoising._CAPTURED[denoiser]
    assert len(kept) == 4
    graphs.clear()  # the doubles refer to the network, unlike CUDA graphs
    kept.clear()
    gone = weakref.ref(denoiser)
    del denoiser
    gc.collect()
    assert gone() is None


def test_results_are_not_overwritten_by_the_next_run(graphs: list[Any]) -> None:
    denoiser = Denoiser().requires_grad_(False)
    first = our_loop(schedule("euler"), denoiser, 7.5)
    before = first.latents.clone()
    our_loop(schedule("ddim"), denoiser, 3.0)
    assert torch.equal(first.latents, before)


def test_serving_code_under_inference_mode_leaves_a_step_that_others_can_use(
    graphs: list[Any],
) -> None:
    denoiser = Denoiser().requires_grad_(False)
    with torch.inference_mode():
        first = our_loop(schedule("lms"), denoiser, 7.5)
    again = our_loop(schedule("lms"), denoiser, 7.5)
    assert torch.equal(first.latents, again.latents)
    assert len(graphs) == 1


def test_a_scale_up_to_1_is_the_conditional_half_alone() -> None:
    output = torch.cat([torch.full((1, 2), torch.nan), torch.ones(1, 2)])
    assert torch.equal(guided(output, torch.tensor([1.0])), torch.ones(1, 2))
    assert torch.equal(guided(output, torch.tensor([0.0])), torch.ones(1, 2))
    halves = torch.tensor([[1.0], [2.0]])
    assert guided(halves, torch.tensor([3.0])).tolist() == [[4.0]]


def test_a_run_can_end_early(denoiser: Denoiser) -> None:
    latents, conditions = start()
    table = schedule("euler")
    options: Any = {"guidance_scale": 5.0, "trajectory": True}
    whole = denoise(denoiser, denoiser, table, latents, conditions, **options)
    part = denoise(denoiser, denoiser, table, latents, conditions, steps=range(2), **options)
    assert torch.equal(part.latents, whole.trajectory[2])
