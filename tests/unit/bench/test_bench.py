"""Latencies are summarized as the article breaks them down; memory is measured apart."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_engines.bench.breakdown import PHASES, distribution, summarize
from diffusion_engines.bench.memory import peak_memory_of
from diffusion_engines.errors import HardwareError
from diffusion_engines.progress import step
from diffusion_engines.runtime.sampling import Durations


def timings(scale: float) -> Durations:
    return Durations(0.01 * scale, 0.2 * scale, [0.05 * scale, 0.1 * scale], 0.03 * scale)


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


def allocate(megabytes: int) -> None:
    block = bytearray(megabytes << 20)
    block[::4096] = b"x" * len(block[::4096])


def die() -> None:
    os._exit(3)


def load_then_run(megabytes: int) -> None:
    with step("load"):
        allocate(megabytes)
    with step("run"):
        pass


def wait(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize("function", [allocate, load_then_run])
def test_memory_is_that_of_the_function_from_its_start(function: Callable[[int], None]) -> None:
    small, large = (peak_memory_of(function, size, gpu=False) for size in (1, 400))
    assert 300 << 20 < large.resident - small.resident < 500 << 20
    assert (large.gpu, large.gpu_pytorch) == (0, 0)


def test_a_process_that_dies_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        peak_memory_of(die, gpu=False)


class NVMLError(Exception):
    """As of pynvml."""


def driver(processes: Callable[[], list[Any]], used: Callable[[], int], **other: Any) -> Any:
    """NVML with two GPUs that hold the same."""
    functions: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: processes(),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=used()),
    }
    return SimpleNamespace(**functions | other)


def test_memory_on_a_gpu_is_the_peak_that_the_driver_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = itertools.chain([3, 3, 8, 8], itertools.repeat(5))

    def processes() -> list[Any]:
        children = [child.pid for child in multiprocessing.active_children()]
        own = [SimpleNamespace(pid=pid, usedGpuMemory=next(sizes)) for pid in children]
        return [SimpleNamespace(pid=1, usedGpuMemory=100), *own]

    monkeypatch.setitem(sys.modules, "pynvml", driver(processes, lambda: 1000))
    assert peak_memory_of(wait, 0.2, gpu=True).gpu == 16


def test_a_driver_that_hides_processes_tells_how_much_the_gpus_grew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = itertools.chain([100, 100], [107, 107], itertools.repeat(101))
    hidden = [SimpleNamespace(pid=-1, usedGpuMemory=None)]
    monkeypatch.setitem(sys.modules, "pynvml", driver(lambda: hidden, lambda: next(used)))
    assert peak_memory_of(wait, 0.2, gpu=True).gpu == 14


def test_a_gpu_whose_driver_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NVMLError("no such library")

    monkeypatch.setitem(sys.modules, "pynvml", driver(list, int, nvmlInit=fail))
    with pytest.raises(HardwareError, match=r"does not tell[\s\S]*no such library"):
        peak_memory_of(wait, 0.0, gpu=True)
