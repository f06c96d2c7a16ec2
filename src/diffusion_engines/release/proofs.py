"""What has to hold of a target's measurements before anybody relies on them. No PyTorch in here."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_engines.bench.results import Benchmark
from diffusion_engines.config import ENGINES
from diffusion_engines.errors import IntegrityError
from diffusion_engines.parity.results import Validation
from diffusion_engines.release.profiles import Timing


def check_passed(validation: Validation) -> None:
    """Raise IntegrityError where a tolerance was missed."""
    if validation.misses:
        raise IntegrityError(
            f"{validation.target} missed {len(validation.misses)} tolerance(s)",
            expected="none",
            found="\n".join(validation.misses[:5]),
        )


def check_same_bytes(
    done: str, stage: str, target: str, there: Mapping[str, str], measured: Mapping[str, str]
) -> None:
    """Compare the manifests of engines with those that were measured, by component.

    Args:
        done: what was done to them, as a participle.
        stage: that did it.
        target: of the engines.
        there: SHA-256 of each manifest.
        measured: likewise, of those that the stage saw.

    Raises:
        IntegrityError: they differ.
    """
    if other := [name for name, digest in there.items() if measured.get(name) != digest]:
        raise IntegrityError(
            f"the engines of {target} are not those that were {done}",
            expected=", ".join(f"{name} {str(measured.get(name))[:12]}" for name in other),
            found=", ".join(f"{name} {there[name][:12]}" for name in other),
            fix=f"`dvc repro {stage}@{target}`",
        )


def timing_from_benchmark(benchmark: Benchmark) -> Timing:
    """Return how fast a target's engines were, and where."""
    return Timing(
        machine=benchmark.machine,
        picture_ms=benchmark.median(ENGINES, "total"),
        denoiser_ms=benchmark.median(ENGINES, "denoiser_call"),
        images_per_second=benchmark.images_per_second[ENGINES],
        steps=benchmark.settings.steps,
    )
