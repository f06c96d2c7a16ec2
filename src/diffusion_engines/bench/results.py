"""What the stage `benchmark` measured: its type, written and read here.

No PyTorch in here: the report reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines import config
from diffusion_engines.bench.memory import PeakMemory
from diffusion_engines.config import ENGINES
from diffusion_engines.files import write_json, write_table
from diffusion_engines.results import read_result, write_result

# Raise it when a field of a result changes.
_VERSION = 2
# The runner that is the target to which another one is an alternative.
OTHER_ENGINES = "other engines"
# The phase that a component takes, by its role.
PHASES = {"encoder": "encoding", "denoiser": "denoiser_call", "decoder": "decoding"}


@dataclass(frozen=True)
class Benchmark:
    """A target's engines beside PyTorch, timed in one run.

    Attributes:
        target: whose engines.
        runners: what was timed: the baselines, of which speedups are over the first, then
            "other engines" where this is an alternative to them, then "engines".
        labels: what each runner is, in words.
        latency: ``latency[runner][phase][statistic]`` in milliseconds.
        memory: the peaks of each runner, in a process of its own.
        images_per_second: of each runner.
        machine: on which all this was measured.
        components: those that have an engine, with their precisions.
        settings: of the timed runs.
        bundles: the SHA-256 of the manifest of each engine's bundle.
        beside: of an alternative, the manifests of the engines that it is timed beside, as the
            runner "other engines"; None: it is none.
        samples: ``samples[runner][phase]``, the milliseconds of each repeat, in the order in which
            the runners took turns; of ``denoiser_call`` the median over a repeat's calls.
    """

    target: str
    runners: tuple[str, ...]
    labels: Mapping[str, str]
    latency: Mapping[str, Mapping[str, Mapping[str, float]]]
    memory: Mapping[str, PeakMemory]
    images_per_second: Mapping[str, float]
    machine: Mapping[str, Any]
    components: Mapping[str, str]
    settings: config.Benchmark
    bundles: Mapping[str, str]
    samples: Mapping[str, Mapping[str, tuple[float, ...]]]
    beside: Mapping[str, str] | None = None

    @property
    def baseline(self) -> str:
        """The runner that speedups are over."""
        return self.runners[0]

    def median(self, runner: str, phase: str) -> float:
        """Median latency in milliseconds."""
        return self.latency[runner][phase]["median_ms"]


def write_benchmark(result: Benchmark, folder: Path, metrics: Path, plot: Path) -> None:
    """Write ``benchmark.json`` into ``folder``; medians and the table of latencies for DVC."""
    write_table(plot, _rows(result))
    write_result(folder / "benchmark.json", result, version=_VERSION)
    write_json(
        metrics,
        {
            "total_ms": result.median(ENGINES, "total"),
            "denoiser_ms": result.median(ENGINES, "denoiser_call"),
            "speedup": _speedup(result, "total"),
            "denoiser_speedup": _speedup(result, "denoiser_call"),
            "peak_mb": round(result.memory[ENGINES].limiting / 1e6),
        },
    )


def _rows(result: Benchmark) -> list[dict[str, Any]]:
    # `timed` is one bar of DVC's plot: those of one phase would be drawn on top of each other.
    return [
        {"timed": f"{phase}, {runner}", "runner": runner, "phase": phase, **values}
        for runner in result.runners
        for phase, values in result.latency[runner].items()
    ]


def _speedup(result: Benchmark, phase: str) -> float:
    return round(result.median(result.baseline, phase) / result.median(ENGINES, phase), 3)


def read_benchmark(folder: Path) -> Benchmark:
    """Read what :func:`write_benchmark` wrote.

    Raises:
        IntegrityError: it is missing, damaged, or of another format.
    """
    return read_result(
        folder / "benchmark.json", Benchmark, version=_VERSION, stage=f"benchmark@{folder.name}"
    )
