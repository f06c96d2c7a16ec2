"""A scheduler's whole run as a table of numbers, read off diffusers' own scheduler.

What almost every scheduler computes in a step is a sum: of the sample, of some earlier samples and
outputs of the denoiser, and of noise, each with a factor that is known before the first step. The
factors are found by feeding the scheduler basis vectors, so no formula is written down twice.
"""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Steps that a scheduler may look back. PNDM with Runge-Kutta steps looks back furthest: 12.
_MEMORY = 16
# Sizes of the values on which a table is tried, so that no clipping passes for a sum.
_MAGNITUDES = (1.0, 1e2, 1e4)
_TRIALS = 4
# Schedulers compute in fp32 in places; relative to the sum of all terms' magnitudes.
_ALLOWED = 1e-5


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a scheduler does in a run, as numbers.

    The sample after step i is ``sum(samples[i, j] * x[i - j] + outputs[i, j] * e[i - j]) +
    noise[i] * z[i]`` over all j, for samples x before each step, outputs e of the denoiser and
    standard normal noise z.

    Attributes:
        timesteps: what the denoiser is told (steps,), fp32.
        input_scales: factor of the sample where the denoiser gets it (steps,), float64.
        init_noise_sigma: factor of the standard normal noise that a run starts from.
        samples: (steps, memory), float64.
        outputs: (steps, memory), float64.
        noise: (steps,), float64.
        draws: whether a step draws noise, even where its factor is 0.
    """

    timesteps: torch.Tensor
    input_scales: torch.Tensor
    init_noise_sigma: float
    samples: torch.Tensor
    outputs: torch.Tensor
    noise: torch.Tensor
    draws: tuple[bool, ...]

    def __len__(self) -> int:
        """The number of steps, each of which calls the denoiser once."""
        return len(self.timesteps)

    @property
    def memory(self) -> int:
        """How many samples and outputs a step may need, those of this step included."""
        return self.samples.shape[1]

    def table(self, memory: int) -> torch.Tensor:
        """Return all numbers as (steps, 3 + 2 * memory), fp32, for rings of so many places.

        Columns: timestep, input scale, the factors of the samples and of the outputs by place in
        the ring (those of step i are at ``i % memory``), the factor of the noise.
        """
        steps = torch.arange(len(self))[:, None]
        places = (steps - torch.arange(self.memory)) % memory
        rings = [
            torch.zeros(len(self), memory, dtype=torch.float64).scatter_(1, places, factors)
            for factors in (self.samples, self.outputs)
        ]
        columns = (self.timesteps[:, None], self.input_scales[:, None], *rings, self.noise[:, None])
        return torch.cat([column.double() for column in columns], dim=1).float()


def schedule_of(scheduler: Any, steps: int) -> Schedule | None:
    """Return what a scheduler does when it is asked for so many steps; it is left as it is.

    None: its steps are no sums (it clips or thresholds, or draws noise in a way of its own), or its
    state is not what its config says.
    """
    cls: Any = type(scheduler)
    try:
        config = scheduler.to_json_string()
        fresh = _fresh(cls, config)
    except Exception:  # a class that cannot be made again from its config, in whichever way it says
        return None
    if hasattr(fresh, "alphas_cumprod"):
        expected, found = fresh.alphas_cumprod, scheduler.alphas_cumprod
        if not torch.equal(expected, found.to(expected.device)):
            return None
    return _schedule(cls, config, steps)


@functools.lru_cache(maxsize=16)
def _fresh(cls: Any, config: str) -> Any:
    return cls.from_config(json.loads(config))


@functools.lru_cache(maxsize=64)
def _schedule(cls: Any, config: str, steps: int) -> Schedule | None:
    scheduler = cls.from_config(json.loads(config))
    try:
        scheduler.set_timesteps(steps)
        return _probe(scheduler)
    except Exception:  # what a scheduler refuses, it refuses in its own words where it is used
        return None


class _Draws(TorchFunctionMode):
    """Gives ``value`` for what ``torch.randn`` is asked for, in this thread alone."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            self.count += 1
            return self.value.clone()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _probe(scheduler: Any) -> Schedule | None:
    """Run a scheduler on many scalars at once, and read its factors off them.

    In a column of the basis, one value is 1 at each step that is a whole number of rounds of
    ``_MEMORY`` steps from another, and everything else is 0: what comes out is the factor. In the
    columns of the trials all values are random, and what comes out must be the sum.
    """
    trials = torch.tensor(_MAGNITUDES, dtype=torch.float64).repeat_interleave(_TRIALS)
    basis = 2 * _MEMORY + 1
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(scheduler.step).parameters
    takes_generator = "generator" in parameters
    # As diffusers' pipelines hand it on; TCD's own default is 0.3.
    step = functools.partial(scheduler.step, eta=0.0) if "eta" in parameters else scheduler.step

    def one(column: int) -> torch.Tensor:
        random = torch.randn(len(trials), generator=generator, dtype=torch.float64) * trials
        one_hot = torch.zeros(basis, dtype=torch.float64)
        one_hot[column] = 1.0
        return torch.cat([one_hot, random])

    past = torch.zeros(basis, len(trials), dtype=torch.float64)
    scales, rows, drawn = [], [], []
    for index, timestep in enumerate(scheduler.timesteps):
        place = index % _MEMORY
        sample, output, noise = (
            value.reshape(1, 1, 1, -1)
            for value in (one(place), one(_MEMORY + place), one(2 * _MEMORY))
        )
        for row, value in ((place, sample), (_MEMORY + place, output), (2 * _MEMORY, noise)):
            past[row] = value.flatten()[basis:]
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample.clone(), timestep)
        scale = scaled.flatten()[place].double()
        if takes_generator:
            with _Draws(noise) as draws:
                result = step(output.clone(), timestep, sample.clone()).prev_sample
            count = draws.count
        else:
            result = step(output.clone(), timestep, sample.clone()).prev_sample
            count = 0
        factors, found = result.double().flatten().split([basis, len(trials)])
        expected, terms = factors @ past, factors.abs() @ past.abs()
        # Not finite counts as no sum.
        is_sum = bool(((found - expected).abs() <= _ALLOWED * terms).all())
        is_scaled = torch.allclose(scaled.double(), scale * sample, rtol=_ALLOWED, atol=0)
        if not is_sum or not is_scaled or count > 1:
            return None
        scales.append(scale)
        rows.append(factors)
        drawn.append(count == 1)
    return _schedule_of_rows(scheduler, torch.stack(scales), torch.stack(rows), tuple(drawn))


def _schedule_of_rows(
    scheduler: Any, scales: torch.Tensor, rows: torch.Tensor, draws: tuple[bool, ...]
) -> Schedule:
    """Order factors by how far back they are, and leave out the past that no step needs."""
    steps = torch.arange(len(rows))[:, None]
    places = (steps - torch.arange(_MEMORY)) % _MEMORY
    samples = rows[:, :_MEMORY].gather(1, places)
    outputs = rows[:, _MEMORY : 2 * _MEMORY].gather(1, places)
    used = ((samples != 0) | (outputs != 0)).any(0).nonzero()
    memory = int(used.max()) + 1 if len(used) else 1
    return Schedule(
        timesteps=torch.as_tensor(scheduler.timesteps).float().cpu(),
        input_scales=scales,
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        samples=samples[:, :memory].contiguous(),
        outputs=outputs[:, :memory].contiguous(),
        noise=rows[:, -1].contiguous(),
        draws=draws,
    )
