"""What a model's noise schedule says of its training, and which solvers can keep to it.

A scheduler of diffusers reads the keys that its constructor has and passes over the rest. Most of
them are the solver's own; those of training decide what the denoiser's output means, so that a
solver which passes over one paints something else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from diffusion_engines.families.base import Scheduler

# Of training: each with what a solver does that lacks the key.
TRAINED: Mapping[str, Any] = {
    "num_train_timesteps": None,
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": None,
    "trained_betas": None,
    "prediction_type": None,
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "sigma_data": None,  # https://arxiv.org/abs/2206.00364
}
# Of the solvers of the families: how a run goes through that schedule. Each takes those that it
# knows from the model's file, as diffusers' own ``from_config`` has it.
SOLVING = frozenset(
    {
        "algorithm_type",
        "clip_sample",
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "final_sigmas_type",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "original_inference_steps",
        "sample_max_value",
        "set_alpha_to_one",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_type",
        "steps_offset",
        "thresholding",
        "timestep_scaling",
        "timestep_spacing",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    }
)


def scheduler_class(name: Any) -> Any:
    """Return a scheduler's class of diffusers; None: it has none of this name."""
    diffusers: Any = importlib.import_module("diffusers")  # untyped
    if not (isinstance(name, str) and name.endswith("Scheduler")):
        return None
    cls = getattr(diffusers, name, None)
    known = isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)
    return cls if known and hasattr(cls, "set_timesteps") else None


def changed_by(scheduler: Scheduler, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what a solver would change of a model's noise schedule.

    Args:
        scheduler: of a family.
        config: the model's ``scheduler_config.json``. One without a class has nothing to change.

    Returns:
        By key of training, what the model has and what the solver would make of it.
    """
    own = scheduler_class(config.get("_class_name"))
    if own is None:
        return {}
    wanted, found = (
        _trained(cls, config, options)
        for cls, options in ((own, {}), (scheduler_class(scheduler.class_name), scheduler.options))
    )
    return {key: (wanted[key], found[key]) for key in TRAINED if wanted[key] != found[key]}


def scheduler_from_config(cls: Any, config: Mapping[str, Any], **options: Any) -> Any:
    """Return a scheduler of a model's ``scheduler_config.json``, without a word on other keys."""
    takes = inspect.signature(cls.__init__).parameters
    return cls.from_config({key: config[key] for key in config if key in takes}, **options)


def _trained(cls: Any, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    used = scheduler_from_config(cls, config, **options).config
    takes = inspect.signature(cls.__init__).parameters
    return {key: used[key] if key in takes else value for key, value in TRAINED.items()}
