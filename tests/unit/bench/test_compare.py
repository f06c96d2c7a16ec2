"""Engines and PyTorch are timed alternately, in one run, and written down side by side."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines import layout
from diffusion_engines.bench import compare
from diffusion_engines.bench.breakdown import PHASES
from diffusion_engines.config import Benchmark
from diffusion_engines.errors import HardwareError
from diffusion_engines.files import write_json
from diffusion_engines.runtime.assemble import torch_networks
from tests.conftest import IMAGE

BENCHMARK = Benchmark(
    prompt="lemons",
    scheduler="euler",
    steps=2,
    guidance_scale=7.5,
    seed=0,
    warmup=1,
    repeats=3,
    baseline_precision="fp32",
    baseline_autocast=False,
)


def test_engines_and_pytorch_are_timed_alternately_and_written_down(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_weights, tmp_path / layout.WEIGHTS)
    monkeypatch.chdir(tmp_path)
    write_json(layout.MACHINE, {"cpu": "of a test"})
    order: list[str] = []

    def runner(name: str) -> Any:
        def make(*arguments: Any) -> Any:
            networks = torch_networks("fp32", "cpu")
            unet = networks["unet"]

            def noted(*tensors: Any) -> Any:
                order.append(name)
                return unet(*tensors)

            return networks | {"unet": noted}

        return make

    monkeypatch.setattr(compare, "_torch_runner", runner("pytorch"))
    monkeypatch.setattr(compare, "_engine_runner", runner("engines"))
    memory = iter([{"resident": 2_000_000, "gpu": 0}, {"resident": 3_000_000, "gpu": 0}])
    monkeypatch.setattr(compare, "peak_memory_of", lambda *arguments: next(memory))
    folder = layout.benchmark("cpu")
    folder.mkdir(parents=True)
    metrics, plot = layout.metrics("benchmark", "cpu"), layout.plot("benchmark", "cpu")
    compare.benchmark_target(
        "cpu", {"unet": "fp32"}, BENCHMARK, IMAGE, folder, metrics, plot, device="cpu"
    )

    runs = BENCHMARK.warmup + BENCHMARK.repeats
    assert order == (["pytorch"] * BENCHMARK.steps + ["engines"] * BENCHMARK.steps) * runs
    found = json.loads(metrics.read_text())
    assert found["peak_mb"] == 3
    details = json.loads((folder / "benchmark.json").read_text())
    total = {name: details["latency"][name]["total"]["median_ms"] for name in details["latency"]}
    assert found["speedup"] == pytest.approx(total["pytorch"] / total["engines"], abs=1e-3)
    assert details["images_per_second"]["engines"] == pytest.approx(1e3 / total["engines"])
    assert details["machine"] == {"cpu": "of a test"}
    assert details["baseline"] == "PyTorch eager fp32"
    with plot.open() as file:
        rows = [(row["runner"], row["phase"]) for row in csv.DictReader(file)]
    assert rows == [(r, p) for r in ("pytorch", "engines") for p in (*PHASES, "unet_call")]


def test_autocast_on_a_cpu_is_refused_before_anything_runs(tmp_path: Path) -> None:
    autocast = Benchmark(**(vars(BENCHMARK) | {"baseline_autocast": True}))
    with pytest.raises(HardwareError, match="baseline_autocast is for CUDA") as raised:
        compare.benchmark_target(
            "cpu", {}, autocast, IMAGE, tmp_path, tmp_path, tmp_path, device="cpu"
        )
    assert "found:    cpu" in str(raised.value)
    assert list(tmp_path.iterdir()) == []
