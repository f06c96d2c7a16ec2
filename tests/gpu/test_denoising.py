"""The denoising loop on a GPU: its latents, one CUDA graph for all runs, and no waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diffusion_engines.families.parts import SCHEDULERS
from diffusion_engines.runtime import denoising
from diffusion_engines.runtime.denoising import denoise, draw_noise
from diffusion_engines.runtime.schedules import schedule_of
from tests.unit.runtime.test_denoising import Denoiser, generators, own_loop, start
from tests.unit.runtime.test_schedules import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def full_fp32() -> Iterator[None]:
    """The CPU's loop is compared with: no convolution in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def network(capturable: bool) -> Any:
    made: Any = Denoiser().requires_grad_(False).cuda()
    made.capturable = capturable
    return made


def run(network: Any, scheduler: Any, steps: int, scale: float | None, **options: Any) -> Any:
    table = schedule_of(scheduler, steps)
    assert table is not None
    latents, conditions = start(scale)
    latents, conditions = latents.cuda(), tuple(value.cuda() for value in conditions)
    return denoise(
        network,
        network,
        table,
        latents * table.init_noise_sigma,
        conditions,
        guidance_scale=scale,
        noise=draw_noise(table, latents, generators()),
        **options,
    )


@pytest.mark.parametrize("capturable", [False, True], ids=["stream", "cuda_graph"])
def test_the_latents_are_those_of_diffusers_on_the_cpu(capturable: bool) -> None:
    on_gpu, on_cpu = network(capturable), Denoiser().requires_grad_(False)
    for name in SCHEDULERS:
        for steps, scale in [(8, 5.0), (3, 1.0), (4, None)]:
            scheduler = make(name)
            found = run(on_gpu, scheduler, steps, scale, trajectory=True)
            expected = own_loop(scheduler, steps, on_cpu, scale, torch.float32)
            assert found.latents.is_cuda
            for ours, theirs in zip(found.trajectory, expected, strict=True):
                assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
            seconds = found.stopwatch.seconds()
            assert len(seconds) == len(expected) - 1
            assert all(0 < value < 10 for value in seconds)
    assert len(denoising._CAPTURED.get(on_gpu, {})) == (2 if capturable else 0)


def test_a_graph_outlives_everything_that_its_first_run_was_given() -> None:
    kept = network(capturable=True)
    first = run(kept, make("lms"), 6, 5.0).latents.clone()
    torch.cuda.empty_cache()
    rubbish = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    assert torch.equal(run(kept, make("lms"), 6, 5.0).latents, first)
    del rubbish


@pytest.mark.parametrize("capturable", [False, True], ids=["stream", "cuda_graph"])
def test_no_step_waits_for_the_gpu(capturable: bool) -> None:
    class Slow(Denoiser):
        def forward(self, *inputs: Any) -> torch.Tensor:
            cuda: Any = torch.cuda  # untyped in places
            cuda._sleep(20_000_000)  # about 10 ms
            return super().forward(*inputs)

    slow: Any = Slow().requires_grad_(False).cuda()
    slow.capturable = capturable
    scheduler = make("euler_ancestral")
    run(slow, scheduler, 20, 5.0)
    torch.cuda.synchronize()
    table = schedule_of(scheduler, 20)
    assert table is not None
    latents, conditions = start(5.0)
    latents, conditions = latents.cuda(), tuple(value.cuda() for value in conditions)
    noise = draw_noise(table, latents, generators())
    torch.cuda.synchronize()
    enqueued: list[float] = []

    def steps() -> Iterator[int]:
        for index in range(20):
            enqueued.append(time.perf_counter())
            yield index

    found = denoise(
        slow, slow, table, latents, conditions, guidance_scale=5.0, noise=noise, steps=steps()
    )
    torch.cuda.synchronize()
    assert enqueued[-1] - enqueued[0] < 0.5 * sum(found.stopwatch.seconds())


# PyTorch's own word about the mode.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_makes_no_synchronizing_call() -> None:
    on_gpu = network(capturable=False)
    latents, conditions = start(5.0)
    table = schedule_of(make("lms"), 5)
    assert table is not None
    state = denoising._allocate(
        latents.cuda(), (conditions[0].cuda(),), 5.0, rows=len(table), memory=5
    )
    denoising._load(state, table, latents.cuda(), (conditions[0].cuda(),), 5.0)
    denoising._step(on_gpu, state)  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            denoising._step(on_gpu, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
