"""What became of each point of a sweep: its state and its numbers, written and read here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusion_engines import manifests
from diffusion_engines.bench.results import read_benchmark
from diffusion_engines.config import ENGINES
from diffusion_engines.errors import IntegrityError
from diffusion_engines.failures import Failure
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Engine
from diffusion_engines.parity.results import read_validation
from diffusion_engines.results import read_result, write_result

# Where the results of sweeps are, below the root of the repository.
SWEEPS = Path("artifacts/sweeps")
_VERSION = 1
_GATE = "GateError"
# "outside": built and measured, and out of a gate's tolerance.
State = Literal["done", "outside", "failed"]


@dataclass(frozen=True)
class Numbers:
    """What a target measured in one point.

    Attributes:
        latency_ms: median milliseconds of a picture.
        repeats_ms: of each repeat.
        speedup: over the first baseline, in the same run.
        memory_mb: peak.
        error: the largest relative L2 error of a component at any recorded call.
        component: whose it is.
        latents_rel_l2: the largest of whole runs.
        psnr: the smallest of the images, in dB.
        size_mb: of the engines' files.
        machine: on which it was timed.
    """

    latency_ms: float
    repeats_ms: tuple[float, ...]
    speedup: float
    memory_mb: float
    error: float
    component: str
    latents_rel_l2: float
    psnr: float
    size_mb: float
    machine: dict[str, Any]


@dataclass(frozen=True)
class PointResult:
    """How a point ended.

    Attributes:
        name: of the point, and of its experiment where it is ``done``.
        overrides: of the point.
        key: of its parameters.
        state: see :data:`State`.
        seconds: that it took, with what was restored of other points.
        error: why it is not ``done``, in a line; "" where it is.
        left: the stages that failed, and those that need them.
        numbers: None where they were not measured.
    """

    name: str
    overrides: tuple[str, ...]
    key: str
    state: State
    seconds: float
    error: str
    left: tuple[str, ...]
    numbers: Numbers | None


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as it was last asked for.

    Attributes:
        name: of its folder.
        target: whose numbers are compared.
        points: name, overrides and key of each.
        command: that runs it, and goes on with it.
    """

    name: str
    target: str
    points: tuple[tuple[str, tuple[str, ...], str], ...]
    command: str


def write_sweep(record: SweepRecord, folder: Path) -> None:
    """Keep what a sweep is."""
    write_result(folder / "sweep.json", record, version=_VERSION)


def read_sweeps(root: Path) -> list[tuple[Path, SweepRecord]]:
    """Return the folder and the record of every sweep, the latest last."""
    paths = (root / SWEEPS).glob("*/sweep.json")
    return [
        (path.parent, read_result(path, SweepRecord, version=_VERSION, fix=f"delete {path.parent}"))
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)
    ]


def results_of(folder: Path, record: SweepRecord) -> list[PointResult]:
    """Return how those points of a sweep ended that have."""
    found = [(key, read_point(folder, name)) for name, _, key in record.points]
    return [result for key, result in found if result is not None and result.key == key]


def write_point(result: PointResult, folder: Path) -> None:
    """Keep how a point ended, in the folder of its sweep."""
    write_result(_path(folder, result.name), result, version=_VERSION)


def read_point(folder: Path, name: str) -> PointResult | None:
    """Return how a point ended; None where it has not, or another version of this wrote it."""
    path = _path(folder, name)
    if not path.is_file():
        return None
    try:
        return read_result(path, PointResult, version=_VERSION, fix=f"delete {path}")
    except IntegrityError:
        return None


def _path(folder: Path, name: str) -> Path:
    return folder / "points" / f"{name}.json"


def result_of(
    root: Path,
    point: tuple[str, tuple[str, ...], str],
    target: str,
    failures: Sequence[Failure],
    after: Collection[str],
    *,
    ended: str,
    seconds: float,
) -> PointResult:
    """Return how a point ended whose run is over.

    Args:
        root: of the workspace that it was run in.
        point: its name, overrides and key.
        target: whose numbers count.
        failures: of its stages.
        after: the stages that were not run because of these.
        ended: what else is wrong, where the run failed and no stage did.
        seconds: that it took.
    """
    left = {failure.stage for failure in failures} | set(after)
    # Where no stage says that it failed, nobody knows whose results lie there.
    numbers = None if ended else numbers_of(root, target, left - _measured_anyway(failures))
    gates = bool(failures) and all(failure.kind == _GATE for failure in failures)
    state: State = "failed"
    if not failures and not ended:
        state = "done"
    elif gates and numbers is not None:
        state = "outside"
    return PointResult(
        *point,
        state=state,
        seconds=round(seconds, 1),
        error="; ".join([*map(_in_a_line, failures), *([ended] if ended else [])]),
        left=tuple(sorted(left)),
        numbers=numbers,
    )


def _measured_anyway(failures: Sequence[Failure]) -> set[str]:
    """The stages that wrote what they measured before they failed of it."""
    return {failure.stage for failure in failures if failure.kind == _GATE}


def _in_a_line(failure: Failure) -> str:
    found = f": expected {failure.expected}, found {failure.found}" if failure.expected else ""
    return " ".join(f"{failure.stage}: {failure.problem}{found}".split())


def numbers_of(root: Path, target: str, stale: Collection[str]) -> Numbers | None:
    """Return what a target measured; None where a part of it is missing, or of an earlier point.

    Args:
        root: of the workspace.
        target: whose.
        stale: stages whose outputs are not of this point.
    """
    workspace = Workspace(root)
    of_engines = tuple(f"{stage}@{target}-" for stage in ("build", "wrap"))
    if {f"validate@{target}", f"benchmark@{target}"} & set(stale) or any(
        stage.startswith(of_engines) for stage in stale
    ):
        return None
    try:
        benchmark = read_benchmark(workspace.benchmark(target))
        validation = read_validation(workspace.validation(target))
        engines = [
            manifests.read(workspace.engine(target, name), Engine, verify=False)
            for name in benchmark.components
        ]
    except IntegrityError:
        return None
    worst = max(validation.components, key=lambda part: part.worst.rel_l2)
    latency = benchmark.median(ENGINES, "total")
    return Numbers(
        latency_ms=latency,
        repeats_ms=benchmark.samples[ENGINES]["total"],
        speedup=benchmark.median(benchmark.baseline, "total") / latency,
        memory_mb=benchmark.memory[ENGINES].limiting / 1e6,
        error=worst.worst.rel_l2,
        component=worst.component,
        latents_rel_l2=validation.latents.worst.rel_l2,
        psnr=min((image.psnr for image in validation.images), default=float("nan")),
        size_mb=sum(file.bytes for one in engines for file in one.files.values()) / 1e6,
        machine=dict(benchmark.machine),
    )
