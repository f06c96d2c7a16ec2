"""Which numbers of two states differ by more than their own noise.

Repeats decide, and no threshold (``bench/noise.py``). A shared machine
drifts from run to run, and a new PyTorch changes the baseline: an engine counts as faster or
slower only where its own milliseconds and its ratio to the baseline of the same run, repeat by
repeat, have both changed, and in the same direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from diffusion_engines import params
from diffusion_engines.bench.noise import direction_of
from diffusion_engines.bench.results import Benchmark
from diffusion_engines.comparison.states import State
from diffusion_engines.config import ENGINES
from diffusion_engines.machines import describe
from diffusion_engines.manifests import Engine
from diffusion_engines.parity.results import Validation

Verdict = Literal["better", "worse", "same", "changed", "unknown"]
_PHASES = {
    "total": "picture",
    "denoiser_call": "call",
    "encoding": "encoding",
    "decoding": "decoding",
}


@dataclass(frozen=True)
class Change:
    """One number in both states.

    Attributes:
        target: whose.
        component: of it; "" for the whole pipeline.
        what: it is, such as ``picture``.
        unit: ``ms``, ``MB``, or "".
        before, after: None where a state lacks it.
        verdict: ``unknown`` where the repeats are too few to tell.
    """

    target: str
    component: str
    what: str
    unit: str
    before: float | None
    after: float | None
    verdict: Verdict

    @property
    def ratio(self) -> float | None:
        """After over before."""
        return self.after / self.before if self.before and self.after is not None else None


def changes(one: State, other: State, pairs: Sequence[tuple[str, str]]) -> list[Change]:
    """Return every number that both states may have, for pairs of targets.

    Args:
        one: before.
        other: after.
        pairs: a target of the one and one of the other, mostly of the same name.
    """
    found: list[Change] = []
    for before, after in pairs:
        found += _timings(after, one.benchmarks.get(before), other.benchmarks.get(after))
        found += _parity(after, one.validations.get(before), other.validations.get(after))
        found += _sizes(before, after, one.engines, other.engines)
    return found


def differences(one: State, other: State, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return in which of their settings, libraries and machines two states differ, a line each."""
    lines: list[str] = []
    for before, after in pairs:
        for (target, component), engine in sorted(other.engines.items()):
            old = one.engines.get((before, component))
            if target == after and old is not None:
                lines += [f"{target}: {line}" for line in _facts(old, engine)]
        old_run, new_run = one.benchmarks.get(before), other.benchmarks.get(after)
        if old_run and new_run and describe(old_run.machine) != describe(new_run.machine):
            lines.append(
                f"{after}: timed on {describe(old_run.machine)} → {describe(new_run.machine)}"
            )
    return list(dict.fromkeys(lines))


def _facts(old: Engine, new: Engine) -> Iterator[str]:
    for name in ("precision", "builder"):
        if (before := getattr(old, name)) != (after := getattr(new, name)):
            yield f"{name} {before} → {after}"
    for name in ("settings", "fingerprint"):
        yield from _keys(getattr(old, name), getattr(new, name))
    yield from _keys(
        {"weights": str(old.onnx.weights)[:12], "opset": old.onnx.opset, **old.onnx.versions},
        {"weights": str(new.onnx.weights)[:12], "opset": new.onnx.opset, **new.onnx.versions},
    )


def _keys(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    for change in params.differences("", before, after):
        old, new = ("none" if value is None else value for value in (change.before, change.after))
        yield f"{change.key.removeprefix('.')} {old} → {new}"


def _timings(target: str, one: Benchmark | None, other: Benchmark | None) -> Iterator[Change]:
    if one is None and other is None:
        return
    for phase, what in _PHASES.items():
        yield Change(
            target,
            "",
            what,
            "ms",
            one.median(ENGINES, phase) if one else None,
            other.median(ENGINES, phase) if other else None,
            _of_timings(one, other, phase) if one and other else "changed",
        )
    for what, number in (("memory", _memory), ("pictures a second", _throughput)):
        before, after = (number(run) if run else None for run in (one, other))
        unit = "MB" if what == "memory" else ""
        # The first is a peak of one process, the second the picture's time again.
        yield Change(target, "", what, unit, before, after, "unknown")


def _memory(run: Benchmark) -> float:
    return run.memory[ENGINES].limiting / 1e6


def _throughput(run: Benchmark) -> float:
    return run.images_per_second[ENGINES]


def _of_timings(one: Benchmark, other: Benchmark, phase: str) -> Verdict:
    own = direction_of(one.samples[ENGINES][phase], other.samples[ENGINES][phase])
    relative = direction_of(_ratios(one, phase), _ratios(other, phase))
    if own is None or relative is None:
        return "unknown"
    if own != relative or own == 0:
        return "same"
    return "better" if own < 0 else "worse"


def _ratios(run: Benchmark, phase: str) -> list[float]:
    """Return the engines' time over the baseline's, which took turns, for each repeat."""
    pairs = zip(run.samples[ENGINES][phase], run.samples[run.baseline][phase], strict=True)
    return [engine / baseline for engine, baseline in pairs if baseline]


def _parity(target: str, one: Validation | None, other: Validation | None) -> Iterator[Change]:
    if one is None and other is None:
        return
    old = {part.component: part for part in one.components} if one else {}
    new = {part.component: part for part in other.components} if other else {}
    for component in dict.fromkeys([*old, *new]):
        before = old[component].worst.rel_l2 if component in old else None
        after = new[component].worst.rel_l2 if component in new else None
        missed = component in new and bool(new[component].misses)
        verdict: Verdict = "worse" if missed else _if_equal(before, after)
        yield Change(target, component, "relative L2", "", before, after, verdict)
    for name in ("psnr", "ssim"):
        before, after = (_worst_picture(run, name) for run in (one, other))
        unit = "dB" if name == "psnr" else ""
        yield Change(target, "", name.upper(), unit, before, after, _if_equal(before, after))


def _worst_picture(run: Validation | None, metric: str) -> float | None:
    return min((getattr(image, metric) for image in run.images), default=None) if run else None


def _if_equal(before: float | None, after: float | None) -> Verdict:
    return "same" if before == after else "changed"


def _sizes(
    before: str,
    after: str,
    one: Mapping[tuple[str, str], Engine],
    other: Mapping[tuple[str, str], Engine],
) -> Iterator[Change]:
    components = [name for target, name in (*one, *other) if target in (before, after)]
    for component in dict.fromkeys(components):
        old, new = (
            _megabytes(one.get((before, component))),
            _megabytes(other.get((after, component))),
        )
        yield Change(after, component, "size", "MB", old, new, _if_equal(old, new))


def _megabytes(engine: Engine | None) -> float | None:
    return sum(file.bytes for file in engine.files.values()) / 1e6 if engine else None


def regressions(found: Sequence[Change]) -> list[Change]:
    """Return what got worse: slower than noise explains, a missed tolerance, an engine less."""
    return [
        change
        for change in found
        if change.verdict == "worse" or (change.what == "size" and change.after is None)
    ]
