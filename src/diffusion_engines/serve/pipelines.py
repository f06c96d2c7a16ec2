"""Diffusers' pipelines, whose denoising loop is this project's where a call allows it.

Diffusers' own ``__call__`` runs in any case: it checks, encodes, draws, decodes and returns. Where
nothing looks into the loop, it finds a scheduler of one step in it, and that step is the whole run
(:mod:`~diffusion_engines.runtime.denoising`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from diffusion_engines.errors import ConfigError
from diffusion_engines.runtime.denoising import denoise, draw_noise
from diffusion_engines.runtime.schedules import Schedule, schedule_of
from diffusion_engines.serve.adapters import UNet
from diffusion_engines.serve.refusals import OF_CALLS, OF_PIPELINES, error, methods


@functools.cache
def engine_pipeline_class(base: Any, denoiser: str, arguments: frozenset[str]) -> Any:
    """Return a class that does what ``base`` does, with the denoising loop on the device.

    It has the name of ``base``: diffusers looks pipelines up by the names of their classes.

    Args:
        base: a pipeline of diffusers.
        denoiser: its attribute that holds the denoiser.
        arguments: of its ``__call__`` with which the loop may be ours, as of
            :class:`~diffusion_engines.families.base.Family`.
    """
    signature = inspect.signature(base.__call__)

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        network = getattr(self, denoiser)
        if not isinstance(network, UNet):  # a PyTorch network has been put in its place
            return base.__call__(self, *args, **kwargs)
        network.engine.check_process()
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError:  # which diffusers' own call raises again
            return base.__call__(self, *args, **kwargs)
        _check_arguments(given)
        if not (_value(given, "height") or _value(given, "width")):
            height, width = (self.vae_scale_factor * edge for edge in network.usual)
            given.arguments.update(height=height, width=width)
        schedule, steps = None, _value(given, "num_inference_steps")
        if isinstance(steps, int) and _settled(given, arguments):
            schedule = schedule_of(self.scheduler, steps)
        args, kwargs = given.args[1:], given.kwargs
        if schedule is None:
            return base.__call__(self, *args, **kwargs)
        whole = _WholeRun(self, network, schedule)
        stand_ins = {
            "scheduler": whole,
            denoiser: _Listener(network, whole),
            "progress_bar": whole.progress_bar,
        }
        # Nothing of the pipeline itself is replaced, not even for a while.
        running = whole.running = copy.copy(self)
        running.__dict__.update(stand_ins)
        self._interrupt = False
        result = base.__call__(running, *args, **kwargs)
        # What a call leaves behind, such as guidance_scale.
        left = running.__dict__.items()
        self.scheduler.__dict__.update(whole.scheduler.__dict__)
        self.__dict__.update({name: value for name, value in left if name not in stand_ins})
        return result

    def copied(self: Any) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    namespace = {
        **methods(OF_PIPELINES, dir(base)),
        "__call__": call,
        "__copy__": copied,
        "__reduce_ex__": _refuse_pickling,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), namespace)


def _refuse_pickling(self: Any, protocol: Any) -> Any:
    raise ConfigError(
        "a pipeline of engines cannot be pickled or copied as a whole",
        expected="the folder that it was loaded from",
        found="engines in the memory of this process",
        fix="hand the folder on, and call `load_pipeline` there",
    )


def _check_arguments(given: inspect.BoundArguments) -> None:
    """Raise ConfigError for what diffusers' pipeline would trip over, or turn into something else.

    Latents that hold no numbers are multiplied by some before an engine sees them.
    """
    for name, refusal in OF_CALLS.items():
        if given.arguments.get(name) is not None:
            raise error(f"argument {name}", refusal)
    latents = _value(given, "latents")
    dtype = latents.dtype if isinstance(latents, torch.Tensor) else torch.float32
    if dtype.is_complex or dtype == torch.bool:
        raise ConfigError(
            "latents: an engine takes real numbers",
            expected="torch.float32",
            found=str(dtype),
            fix="leave them out, or give numbers drawn from a normal distribution",
        )


def _settled(given: inspect.BoundArguments, arguments: Collection[str]) -> bool:
    """Whether a call has the defaults in all arguments but those that the loop need not know."""
    parameters = given.signature.parameters
    for name, value in [*given.arguments.items()][1:]:  # without self
        if name in arguments:
            continue
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            return False
        default = parameters[name].default
        same = isinstance(value, (bool, int, float, str)) and value == default
        empty = isinstance(value, Mapping) and not value and default is None
        if value is not default and not same and not empty:
            return False
    latents = _value(given, "latents")
    return latents is None or getattr(latents, "dtype", None) == torch.float32


def _value(given: inspect.BoundArguments, name: str) -> Any:
    parameter = given.signature.parameters.get(name)
    return given.arguments.get(name, parameter and parameter.default)


class _WholeRun:
    """What a pipeline takes for its scheduler during a call: one step, which is all of them."""

    def __init__(self, pipeline: Any, denoiser: UNet, schedule: Schedule) -> None:
        self.pipeline = pipeline
        self.running: Any = None  # the pipeline as the call sees it
        # A copy: another thread may be asking for other timesteps.
        self.scheduler = copy.copy(pipeline.scheduler)
        self.denoiser = denoiser
        self.schedule = schedule
        self.conditions: tuple[torch.Tensor, ...] = ()
        self.bar: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set those of the scheduler, and show the first."""
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.timesteps = self.scheduler.timesteps[:1]

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """Return the sample as it is: the loop scales it."""
        return sample

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        """Return the pipeline's own bar, for the loop to move it."""
        self.bar = self.pipeline.progress_bar(*args, **kwargs)
        return self.bar

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        """Return the latents after the last step; the output of the denoiser is none."""
        running = self.running
        running._num_timesteps = len(self.schedule)
        denoised = denoise(
            self.denoiser.noise,
            self.denoiser,
            self.schedule,
            sample,
            self.conditions,
            guidance_scale=running.guidance_scale if running.do_classifier_free_guidance else None,
            noise=draw_noise(self.schedule, sample, generator),
            steps=self._steps(),
        )
        return (denoised.latents.to(sample.dtype),)

    def _steps(self) -> Iterator[int]:
        """Count the steps until the pipeline is interrupted; move its bar as diffusers does."""
        count, order = len(self.schedule), self.scheduler.order
        warmup = count - self.bar.total * order
        for index in range(count):
            if self.pipeline.interrupt:
                return
            yield index
            # The pipeline itself moves the bar for its one step.
            if index + 1 < count and index + 1 > warmup and (index + 1) % order == 0:
                self.bar.update()


class _Listener:
    """What a pipeline takes for its denoiser during a call: it keeps the conditions."""

    def __init__(self, denoiser: UNet, whole: _WholeRun) -> None:
        self.denoiser = denoiser
        self.whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        **conditions: Mapping[str, torch.Tensor] | None,
    ) -> tuple[torch.Tensor]:
        """Return something like a prediction, which nobody reads."""
        self.whole.conditions = self.denoiser.conditions(encoder_hidden_states, **conditions)
        return (sample,)
