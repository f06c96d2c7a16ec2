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
from diffusion_engines.config import Baseline, Benchmark
from diffusion_engines.errors import HardwareError, IntegrityError
from diffusion_engines.files import write_json
from diffusion_engines.layout import Workspace
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
    baselines={
        "pytorch": Baseline("fp32", autocast=False, compile=None, channels_last=False),
        "compiled": Baseline("fp32", autocast=False, compile="default", channels_last=True),
    },
)


def test_engines_and_pytorch_are_timed_alternately_and_written_down(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_weights, tmp_path / layout.WEIGHTS)
    monkeypatch.chdir(tmp_path)
    write_json(layout.MACHINE, {"cpu": "of a test"})
    order: list[str] = []

    def noting(name: str) -> Any:
        networks = torch_networks("fp32", "cpu", weights=layout.WEIGHTS)
        unet = networks["unet"]

        def noted(*tensors: Any) -> Any:
            order.append(name)
            return unet(*tensors)

        return networks | {"unet": noted}

    made: list[Any] = []

    def engines(*arguments: Any, **options: Any) -> Any:
        made.append((arguments, options))
        return noting("engines")

    monkeypatch.setattr(
        compare, "_torch_runner", lambda baseline, device: noting(baseline.compile or "pytorch")
    )
    monkeypatch.setattr(compare, "target_networks", engines)
    memory = iter([{"resident": i * 1_000_000, "gpu": 0} for i in (1, 2, 3)])
    monkeypatch.setattr(compare, "peak_memory_of", lambda *arguments: next(memory))
    folder = layout.benchmark("cpu")
    folder.mkdir(parents=True)
    metrics, plot = layout.metrics("benchmark", "cpu"), layout.plot("benchmark", "cpu")
    compare.benchmark_target(
        "cpu", {"unet": "fp32"}, BENCHMARK, IMAGE, folder, metrics, plot, device="cpu"
    )

    runs = BENCHMARK.warmup + BENCHMARK.repeats
    turn = [name for name in ("pytorch", "default", "engines") for _ in range(BENCHMARK.steps)]
    assert order == turn * runs
    # What has no engine runs as in the first baseline.
    assert made == [((Workspace(), "cpu", {"unet": "fp32"}, "cpu"), {"torch_precision": "fp32"})]
    found = json.loads(metrics.read_text())
    assert found["peak_mb"] == 3
    details = json.loads((folder / "benchmark.json").read_text())
    total = {name: details["latency"][name]["total"]["median_ms"] for name in details["latency"]}
    assert found["speedup"] == pytest.approx(total["pytorch"] / total["engines"], abs=1e-3)
    assert details["images_per_second"]["engines"] == pytest.approx(1e3 / total["engines"])
    assert details["machine"] == {"cpu": "of a test"}
    assert details["runners"] == [  # in order: speedups are over the first
        ["pytorch", "PyTorch eager, fp32"],
        ["compiled", "torch.compile, default, fp32, channels last"],
        ["engines", "engines, cpu"],
    ]
    with plot.open() as file:
        rows = [(row["runner"], row["phase"]) for row in csv.DictReader(file)]
    runners = ("pytorch", "compiled", "engines")
    assert rows == [(r, p) for r in runners for p in (*PHASES, "denoiser_call")]


def test_a_machine_that_was_not_probed_is_noticed_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError, match=r"machine\.json does not exist"):
        compare.benchmark_target(
            "cpu", {}, BENCHMARK, IMAGE, tmp_path, tmp_path, tmp_path, device="cpu"
        )


def test_autocast_on_a_cpu_is_refused_before_anything_runs(tmp_path: Path) -> None:
    article = {"article": Baseline("fp16", autocast=True, compile=None, channels_last=False)}
    autocast = Benchmark(**(vars(BENCHMARK) | {"baselines": BENCHMARK.baselines | article}))
    with pytest.raises(HardwareError, match=r"baselines\.article\.autocast is for CUDA") as raised:
        compare.benchmark_target(
            "cpu", {}, autocast, IMAGE, tmp_path, tmp_path, tmp_path, device="cpu"
        )
    assert "found:    cpu" in str(raised.value)
    assert list(tmp_path.iterdir()) == []
