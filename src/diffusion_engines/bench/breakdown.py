"""The latency breakdown of the PhotoRoom article, as distributions over repeated runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion_engines.runtime.sampling import Durations

# In the order of the article's tables. `denoiser` and `scheduler_and_guidance` are the denoising
# loop.
PHASES = (
    "encoding",
    "denoising_loop",
    "denoiser",
    "scheduler_and_guidance",
    "decoding",
    "total",
)


def phase_milliseconds(durations: Durations) -> dict[str, float]:
    """Return the milliseconds of each phase of one run; ``denoiser`` is the sum over all steps."""
    seconds = {
        "encoding": durations.encoding,
        "denoising_loop": durations.denoising_loop,
        "denoiser": sum(durations.denoiser),
        "scheduler_and_guidance": durations.scheduler_and_guidance,
        "decoding": durations.decoding,
        "total": durations.total,
    }
    return {phase: seconds[phase] * 1e3 for phase in PHASES}


def distribution(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return mean, median, p90, p99, smallest and largest of repeated measurements."""
    values = np.asarray(milliseconds, dtype=np.float64)
    median, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        "mean_ms": round(float(values.mean()), 3),
        "median_ms": round(float(median), 3),
        "p90_ms": round(float(p90), 3),
        "p99_ms": round(float(p99), 3),
        "min_ms": round(float(values.min()), 3),
        "max_ms": round(float(values.max()), 3),
    }


def summarize(runs: Sequence[Durations]) -> dict[str, dict[str, float]]:
    """Return the distribution of every phase, and of one call of the denoiser, over all runs.

    What a call holds, and on whose clock, is said by ``Durations``.
    """
    phases = [phase_milliseconds(run) for run in runs]
    table = {phase: distribution([row[phase] for row in phases]) for phase in PHASES}
    table["denoiser_call"] = distribution([s * 1e3 for run in runs for s in run.denoiser])
    return table


def samples_of(runs: Sequence[Durations]) -> dict[str, tuple[float, ...]]:
    """Return the milliseconds of each run by phase; a call of the denoiser as a run's median."""
    phases = [phase_milliseconds(run) for run in runs]
    table = {phase: tuple(round(row[phase], 3) for row in phases) for phase in PHASES}
    calls = [float(np.median(run.denoiser)) * 1e3 for run in runs]
    table["denoiser_call"] = tuple(round(call, 3) for call in calls)
    return table
