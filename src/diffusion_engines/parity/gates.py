"""Compare measured differences with tolerances; collect every miss before failing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from diffusion_engines.config import Gate, ImageGate, LatentsGate, Validate
from diffusion_engines.errors import ConfigError
from diffusion_engines.parity.distances import Difference

# How a metric is written. Of those that the second table names, more is better.
_WRITTEN = {
    "rel_l2": "rel_l2 {:.2e}",
    "max_abs": "max_abs {:.2e}",
    "cosine": "cosine {:.7f}",
    "psnr": "PSNR {:.1f} dB",
    "ssim": "SSIM {:.4f}",
}
_AT_LEAST = ("cosine", "psnr", "ssim")


def within(metric: str, found: float, tolerance: float) -> bool:
    """Whether a measured value is within tolerance; NaN and infinities never are."""
    if not math.isfinite(found):
        return False
    return found >= tolerance if metric in _AT_LEAST else found <= tolerance


def misses_of(where: str, tolerances: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """Describe every metric that is out of tolerance.

    Args:
        where: what was measured, for the text.
        tolerances: by metric.
        found: a value for each of them; where ``not_finite`` values are counted too, none may be.
    """
    if broken := found.get("not_finite"):
        return [f"{where}: {broken} values are NaN or infinite"]
    return [
        f"{where}: {_miss(metric, found[metric], tolerance)}"
        for metric, tolerance in tolerances.items()
        if not within(metric, found[metric], tolerance)
    ]


def _miss(metric: str, found: float, tolerance: float) -> str:
    text = _WRITTEN[metric]
    name, limit = text.format(tolerance).split(maxsplit=1)
    if math.isnan(found):
        return f"{name} is NaN"
    return f"{text.format(found)} {'<' if metric in _AT_LEAST else '>'} {limit}"


def gate_of(validate: Validate, component: str, precision: str) -> Gate:
    """Return the tolerance of one component in one precision.

    Raises:
        ConfigError: there is none, so nothing could be said about the engine.
    """
    try:
        return validate.components[component][precision]  # type: ignore[index]
    except KeyError as error:
        raise ConfigError(
            f"validate.components.{component}.{precision} has no tolerance (conf/validate/)",
            expected="rel_l2, max_abs and cosine",
            fix="measure what the precision costs with a loose one, then write it down",
        ) from error


def misses_of_component(label: str, gate: Gate, differences: Sequence[Difference]) -> list[str]:
    """Describe every timestep whose difference exceeds the tolerance."""
    return [
        miss
        for index, found in enumerate(differences)
        for miss in misses_of(f"{label}, call {index}", asdict(gate), asdict(found))
    ]


def run_gates_of(validate: Validate, precision: str) -> tuple[LatentsGate, ImageGate]:
    """Return the tolerances of a whole run: of its latents at any step, and of its images.

    Raises:
        ConfigError: there are none for this precision.
    """
    for name in ("latents", "images"):
        if precision not in getattr(validate, name):
            raise ConfigError(f"validate.{name}.{precision} has no tolerance (conf/validate/)")
    return validate.latents[precision], validate.images[precision]  # type: ignore[index]


def misses_of_latents(gate: LatentsGate, images: Sequence[Sequence[Difference]]) -> list[str]:
    """Describe the first step of each image after which its latents exceed the tolerance.

    The first alone: what is off stays off, as later steps start from it.
    """
    misses = []
    for index, steps in enumerate(images):
        for step, found in enumerate(steps, 1):
            where = f"latents of image {index}, step {step} of {len(steps)}"
            if missed := misses_of(where, asdict(gate), asdict(found)):
                misses += missed[:1]
                break
    return misses
