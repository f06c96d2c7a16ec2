"""Of the engines for one kind of hardware, the fastest of each component that passed.

An alternative was timed in one run with the target that it is one to, in turns, so that two
alternatives compare by what each gained over that target. Repeats decide (``bench/noise.py``): what
is not faster beyond their noise changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffusion_engines.bench.noise import direction_of
from diffusion_engines.bench.results import OTHER_ENGINES, PHASES, Benchmark
from diffusion_engines.config import ENGINES
from diffusion_engines.errors import IntegrityError
from diffusion_engines.families import role_of
from diffusion_engines.parity.results import Validation
from diffusion_engines.release.chosen import Chosen, Pick
from diffusion_engines.release.profiles import Profile
from diffusion_engines.release.proofs import check_passed, check_same_bytes, timing_from_benchmark


@dataclass(frozen=True)
class Measurements:
    """What is known of a target's engines.

    Attributes:
        backend: what runs them.
        device: ``cpu`` or ``cuda``.
        validation, benchmark: what the stages of these names found.
    """

    backend: str
    device: str
    validation: Validation
    benchmark: Benchmark


def choose_engines(
    target: str, own: Measurements, alternatives: Mapping[str, Measurements]
) -> Chosen:
    """Return whose engine of each component is the fastest of those that passed.

    Args:
        target: to which the others are alternatives.
        own: what was measured of it.
        alternatives: likewise, by their names.

    Raises:
        IntegrityError: the target's own measurements missed a tolerance, or are of other bytes
            than one another.
    """
    profile = _profile(target, own)
    profiles, passed_over = [profile], {}
    for name, found in alternatives.items():
        try:
            alternative = _profile(name, found)
            there = dict(found.benchmark.beside or {})
            check_same_bytes("timed beside it", "benchmark", target, profile.manifests, there)
        except IntegrityError as error:
            passed_over[name] = error.in_a_line
        else:
            profiles.append(alternative)
    runs = {one.target: alternatives[one.target].benchmark for one in profiles[1:]}
    return Chosen(
        target=target,
        profiles=tuple(profiles),
        passed_over=passed_over,
        components={name: _pick(target, name, runs) for name in profile.precisions},
    )


def _profile(target: str, found: Measurements) -> Profile:
    """Return a target's profile; raise IntegrityError where its engines are not proven."""
    check_passed(found.validation)
    validated = dict(found.validation.bundles)
    check_same_bytes("timed", "benchmark", target, validated, found.benchmark.bundles)
    return Profile(
        target=target,
        backend=found.backend,
        device=found.device,
        precisions=found.benchmark.components,
        timing=timing_from_benchmark(found.benchmark),
        bytes=None,
        manifests=validated,
        receipt=None,
    )


def _pick(target: str, component: str, runs: Mapping[str, Benchmark]) -> Pick:
    runs = {name: run for name, run in runs.items() if component in run.components}
    phase = PHASES.get(role_of(component) or "")
    if phase is None:
        return Pick(target, {}, "a component of this role is not timed alone")
    if not runs:
        return Pick(target, {}, "no alternative that passed has an engine of it")
    times = {
        name: (run.median(ENGINES, phase), run.median(OTHER_ENGINES, phase))
        for name, run in runs.items()
    }
    faster = [name for name, run in runs.items() if _is_faster(run, phase)]
    if not faster:
        return Pick(target, times, "no alternative is faster beyond the noise of the repeats")
    best = min(faster, key=lambda name: (times[name][0] / times[name][1], name))
    ours, theirs = times[best]
    return Pick(
        best,
        times,
        f"{ours:.3g} ms, {target} {theirs:.3g} ms in the same run: {theirs / ours:.2f}×",
    )


def _is_faster(run: Benchmark, phase: str) -> bool:
    return direction_of(run.samples[OTHER_ENGINES][phase], run.samples[ENGINES][phase]) == -1
