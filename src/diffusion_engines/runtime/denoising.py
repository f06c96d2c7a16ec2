"""The denoising loop on the device, of a scheduler that is a table of numbers.

The host only enqueues: nothing in a step reads from the device or copies to it. Where the denoiser
allows it, a step on a GPU is one CUDA graph that every later run of the same shapes replays.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusion_engines.runtime.cuda_graphs import capture, cuda
from diffusion_engines.runtime.schedules import Schedule

# ``denoiser(rows, timestep, conditions)``: latents (rows, channels, h, w), fp32, a timestep as a
# 0-d tensor, and what the denoiser is conditioned on; returns a prediction like the latents.
Denoiser = Callable[[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]], torch.Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None

# Kept steps serve every scheduler that fits: room for 1000 steps, and for PNDM's memory.
_ROWS = 1024
_MEMORY = 5
# Captured steps that are kept for each denoiser: other sizes, with and without guidance.
_KEPT = 4
# As PyTorch's own `make_graphed_callables` does before it captures.
_WARMUP = 3


class Stopwatch:
    """Times the work of a device on its own clock, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Begin an interval, or end the one that has begun."""
        if self._cuda:
            event = cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the length of each interval; on a GPU, wait for the last one."""
        if not self._cuda:
            return [end - start for start, end in self._intervals()]
        if self._marks:
            self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in self._intervals()]

    def _intervals(self) -> Iterable[tuple[Any, Any]]:
        return zip(self._marks[::2], self._marks[1::2], strict=True)


@dataclass(frozen=True)
class Denoised:
    """What a run of the loop gives.

    Attributes:
        latents: after the last step, fp32, on the device.
        trajectory: before the first step and after each, fp32, on the CPU; empty if not asked for.
        stopwatch: has an interval for each step: the denoiser's call, or the whole step where that
            is one CUDA graph.
    """

    latents: torch.Tensor
    trajectory: list[torch.Tensor]
    stopwatch: Stopwatch


@dataclass(frozen=True)
class _State:
    """All that a step reads and writes, in memory that stays where it is.

    Attributes:
        latents: (batch, channels, h, w), fp32.
        history: (2 * memory + 1, *latents): rings of samples and of the denoiser's outputs, and
            this step's noise.
        table: of :meth:`Schedule.table`.
        counter: of the steps (1,), int64.
        guidance_scale: (1,); None where the rows are no two halves.
        conditions: a row for each row of the denoiser.
    """

    latents: torch.Tensor
    history: torch.Tensor
    table: torch.Tensor
    counter: torch.Tensor
    guidance_scale: torch.Tensor | None
    conditions: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Captured:
    """A step as a CUDA graph, which works in the memory of its state."""

    state: _State
    graph: Any


# Of the runs that replay captured steps.
_TURN = threading.Lock()
# By the denoiser's network. Neither a graph nor its state refers to it, so both go when it goes.
_CAPTURED: WeakKeyDictionary[Any, OrderedDict[Any, _Captured]] = WeakKeyDictionary()


def _captures(network: Any, device: torch.device) -> bool:
    """Whether a network's calls can be part of a CUDA graph, as its ``capturable`` says.

    They then do nothing but enqueue work on PyTorch's current stream, and all memory that they use
    lives as long as the network.
    """
    return device.type == "cuda" and bool(getattr(network, "capturable", False))


def denoise(
    denoiser: Denoiser,
    network: Any,
    schedule: Schedule,
    latents: torch.Tensor,
    conditions: tuple[torch.Tensor, ...],
    *,
    guidance_scale: float | None,
    noise: torch.Tensor | None = None,
    steps: Iterable[int] | None = None,
    trajectory: bool = False,
) -> Denoised:
    """Run the loop where the latents are.

    A captured step works in memory of its own: threads take turns with their runs, and must share a
    stream, as they do unless they choose others.

    Args:
        denoiser: what is called at each step.
        network: that the denoiser calls; captured steps are kept for it.
        schedule: of the scheduler.
        latents: (batch, channels, h, w), times ``init_noise_sigma``.
        conditions: of the denoiser, on the same device.
        guidance_scale: for twice as many rows as latents, the unconditional ones first; a scale up
            to 1 takes the conditional rows as they are. None: as many rows as latents.
        noise: of :func:`draw_noise`.
        steps: 0, 1, … as far as the run shall go; None: to the end.
        trajectory: whether to collect the latents of every step.
    """
    captures = _captures(network, latents.device)
    turn = _TURN if captures else contextlib.nullcontext()
    # What is captured under inference_mode could not be written to outside of it.
    with torch.inference_mode(False), torch.no_grad(), turn:
        stopwatch = Stopwatch(latents.device)
        if captures:
            captured = _captured(denoiser, network, schedule, latents, conditions, guidance_scale)
            state = captured.state

            def advance() -> None:
                stopwatch.mark()
                captured.graph.replay()
                stopwatch.mark()

        else:
            state = _allocate(
                latents, conditions, guidance_scale, rows=len(schedule), memory=schedule.memory
            )

            def timed(*inputs: Any) -> torch.Tensor:
                stopwatch.mark()
                output = denoiser(*inputs)
                stopwatch.mark()
                return output

            def advance() -> None:
                _step(timed, state)

        _load(state, schedule, latents, conditions, guidance_scale)
        collected = [state.latents.clone()] if trajectory else []
        for index in range(len(schedule)) if steps is None else steps:
            if noise is not None:
                state.history[-1].copy_(noise[index])
            advance()
            if trajectory:
                collected.append(state.latents.clone())
        on_host = [*torch.stack(collected).cpu()] if trajectory else []
        return Denoised(state.latents.clone(), on_host, stopwatch)


def draw_noise(
    schedule: Schedule, latents: torch.Tensor, generators: Generators
) -> torch.Tensor | None:
    """Return the noise of every step (steps, *latents), fp32, on the latents' device.

    It is what diffusers' schedulers draw from the same generators, one step after the other. None:
    no step draws any.

    Args:
        schedule: says which steps do.
        latents: have the shape and the device.
        generators: one for all images, or one for each; None: PyTorch's own of the device.
    """
    if not any(schedule.draws):
        return None
    one = generators[0] if isinstance(generators, Sequence) else generators
    device = latents.device if one is None else one.device
    many = list(generators) if isinstance(generators, Sequence) else generators
    shape = tuple(latents.shape)
    drawn = [
        randn_tensor(shape, generator=many, device=device, dtype=torch.float32)
        if draws
        else torch.zeros(shape, device=device)
        for draws in schedule.draws
    ]
    return torch.stack(drawn).to(latents.device)


def guided(output: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Combine the two halves of classifier-free guidance; a scale up to 1 is none.

    Args:
        output: (2 * batch, channels, h, w), the unconditional half first.
        scale: (1,), on the same device, so that nothing waits for it.
    """
    unconditional, conditional = output.chunk(2)
    combined = unconditional + scale * (conditional - unconditional)
    return torch.where(scale <= 1.0, conditional, combined)


def _step(denoiser: Denoiser, state: _State) -> None:
    """Take the step that the state's counter stands at, and advance it."""
    memory = len(state.history) // 2
    row = state.table.index_select(0, state.counter)[0]
    timestep, input_scale, factors = row[0], row[1], row[2:]
    scaled = state.latents * input_scale
    # With a scale of 1 both halves still run: engines have the batch size of two halves.
    rows = scaled if state.guidance_scale is None else torch.cat([scaled, scaled])
    output = denoiser(rows, timestep, state.conditions).float()
    if state.guidance_scale is not None:
        output = guided(output, state.guidance_scale)
    place = state.counter % memory
    state.history.index_copy_(0, place, state.latents[None])
    state.history.index_copy_(0, place + memory, output[None])
    # No matmul: it may be TF32, as the serving code has set it.
    terms = state.history * factors.reshape(-1, *[1] * state.latents.dim())
    state.latents.copy_(terms.sum(0))
    state.counter.add_(1)


def _allocate(
    latents: torch.Tensor,
    conditions: tuple[torch.Tensor, ...],
    guidance_scale: float | None,
    *,
    rows: int,
    memory: int,
) -> _State:
    zeros = torch.zeros_like(latents, dtype=torch.float32, memory_format=torch.contiguous_format)
    return _State(
        latents=zeros,
        history=zeros.new_zeros(2 * memory + 1, *zeros.shape),
        table=zeros.new_zeros(rows, 3 + 2 * memory),
        counter=torch.zeros(1, dtype=torch.int64, device=zeros.device),
        guidance_scale=None if guidance_scale is None else zeros.new_zeros(1),
        conditions=tuple(torch.empty_like(value) for value in conditions),
    )


def _load(
    state: _State,
    schedule: Schedule,
    latents: torch.Tensor,
    conditions: tuple[torch.Tensor, ...],
    guidance_scale: float | None,
) -> None:
    """Set a state to the beginning of a run."""
    state.latents.copy_(latents)
    # A NaN of an earlier run would survive a factor of 0.
    state.history.zero_()
    state.table[: len(schedule)].copy_(schedule.table(len(state.history) // 2))
    state.counter.zero_()
    if state.guidance_scale is not None and guidance_scale is not None:
        state.guidance_scale.fill_(guidance_scale)
    for kept, value in zip(state.conditions, conditions, strict=True):
        kept.copy_(value)


def _captured(
    denoiser: Denoiser,
    network: Any,
    schedule: Schedule,
    latents: torch.Tensor,
    conditions: tuple[torch.Tensor, ...],
    guidance_scale: float | None,
) -> _Captured:
    """Return the captured step of these shapes; capture it where there is none yet."""
    rows, memory = max(_ROWS, len(schedule)), max(_MEMORY, schedule.memory)
    shapes = tuple((tuple(value.shape), value.dtype) for value in conditions)
    key = (tuple(latents.shape), latents.device, shapes, guidance_scale is None, rows, memory)
    kept = _CAPTURED.setdefault(network, OrderedDict())
    if key not in kept:
        state = _allocate(latents, conditions, guidance_scale, rows=rows, memory=memory)
        _load(state, schedule, latents, conditions, guidance_scale)
        kept[key] = _Captured(state, _graph(denoiser, state))
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)
    return kept[key]


def _graph(denoiser: Denoiser, state: _State) -> Any:
    with cuda.device(state.latents.device):
        graph, _ = capture(functools.partial(_step, denoiser, state), warmup=_WARMUP)
        return graph
