"""Latencies are summarized as the article breaks them down; memory is measured apart."""

from __future__ import annotations

import os

import pytest

from diffusion_engines.bench.breakdown import PHASES, distribution, rows, summarize
from diffusion_engines.bench.memory import peak_memory_of
from diffusion_engines.runtime.sampling import Timings


def timings(scale: float) -> Timings:
    return Timings(0.01 * scale, 0.2 * scale, [0.05 * scale, 0.1 * scale], 0.03 * scale)


def test_the_parts_add_up_to_the_total() -> None:
    summary = summarize([timings(1.0)])
    medians = {phase: summary[phase]["median_ms"] for phase in PHASES}
    assert medians == pytest.approx(
        {
            "encoding": 10,
            "denoising_loop": 200,
            "denoiser": 150,
            "scheduler_and_guidance": 50,
            "decoding": 30,
            "total": 240,
        }
    )
    assert summary["denoiser_call"]["median_ms"] == pytest.approx(75)
    assert summary["denoiser_call"]["max_ms"] == pytest.approx(100)


def test_percentiles_are_those_of_the_runs() -> None:
    found = distribution([float(i) for i in range(1, 102)])
    assert (found["median_ms"], found["p90_ms"], found["p99_ms"]) == (51, 91, 100)
    assert (found["min_ms"], found["max_ms"]) == (1, 101)
    assert distribution([1.0, 2.0, 6.0])["mean_ms"] == 3


def test_a_table_has_a_row_for_each_phase() -> None:
    table = rows("engines", summarize([timings(1.0), timings(2.0)]))
    assert [row["phase"] for row in table] == [*PHASES, "denoiser_call"]
    assert {row["runner"] for row in table} == {"engines"}


def allocate(megabytes: int) -> None:
    block = bytearray(megabytes << 20)
    block[::4096] = b"x" * len(block[::4096])


def die() -> None:
    os._exit(3)


def test_memory_is_that_of_the_function() -> None:
    small, large = (peak_memory_of(allocate, size)["resident"] for size in (1, 400))
    assert 300 << 20 < large - small < 500 << 20


def test_a_process_that_dies_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        peak_memory_of(die)
