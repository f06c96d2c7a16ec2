"""Compare measured differences with tolerances; collect every miss before failing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusion_engines.config import Gate, ImageGate, LatentsGate, Validate
from diffusion_engines.errors import ConfigError
from diffusion_engines.parity.metrics import Difference


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
    misses = []
    for index, found in enumerate(differences):
        where = f"{label}, call {index}"
        if found.not_finite:
            misses.append(f"{where}: {found.not_finite} values are NaN or infinite")
            continue
        if found.rel_l2 > gate.rel_l2:
            misses.append(f"{where}: rel_l2 {found.rel_l2:.2e} > {gate.rel_l2:.2e}")
        if found.max_abs > gate.max_abs:
            misses.append(f"{where}: max_abs {found.max_abs:.2e} > {gate.max_abs:.2e}")
        if found.cosine < gate.cosine:
            misses.append(f"{where}: cosine {found.cosine:.6f} < {gate.cosine:.6f}")
    return misses


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
            if found.not_finite:
                misses.append(f"{where}: {found.not_finite} values are NaN or infinite")
            elif found.rel_l2 > gate.rel_l2:
                misses.append(f"{where}: rel_l2 {found.rel_l2:.2e} > {gate.rel_l2:.2e}")
            elif found.cosine < gate.cosine:
                misses.append(f"{where}: cosine {found.cosine:.7f} < {gate.cosine:.7f}")
            else:
                continue
            break
    return misses


def misses_of_images(gate: ImageGate, images: Sequence[Mapping[str, float]]) -> list[str]:
    """Describe every image that is too far from its reference."""
    misses = []
    for index, found in enumerate(images):
        if found["psnr"] < gate.psnr:
            misses.append(f"image {index}: PSNR {found['psnr']:.1f} dB < {gate.psnr:.1f} dB")
        if found["ssim"] < gate.ssim:
            misses.append(f"image {index}: SSIM {found['ssim']:.4f} < {gate.ssim:.4f}")
    return misses
