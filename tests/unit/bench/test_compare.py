"""Engines and PyTorch are timed alternately, in one run, and written down side by side."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines import manifests
from diffusion_engines.bench import compare
from diffusion_engines.bench.breakdown import PHASES
from diffusion_engines.bench.memory import PeakMemory
from diffusion_engines.bench.results import read_benchmark, write_benchmark
from diffusion_engines.config import Baseline, Benchmark
from diffusion_engines.errors import ConfigError, HardwareError
from diffusion_engines.files import MANIFEST, write_json
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


MACHINE = {"cpu": "of a test"}


def test_engines_and_pytorch_are_timed_alternately_and_written_down(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    shutil.copytree(tiny_weights, workspace.weights)
    write_json(workspace.bundle("cpu", "unet") / MANIFEST, {"files": {}})
    order: list[str] = []

    def noting(name: str, weights: Path) -> Any:
        networks = torch_networks("fp32", "cpu", weights=weights)
        unet = networks["unet"]

        def noted(*tensors: Any) -> Any:
            order.append(name)
            return unet(*tensors)

        return networks | {"unet": noted}

    made: list[Any] = []

    def engines(*arguments: Any, **options: Any) -> Any:
        made.append((arguments, options))
        return noting("engines", options["workspace"].weights)

    monkeypatch.setattr(
        compare,
        "_torch_runner",
        lambda baseline, weights, device: noting(baseline.compile or "pytorch", weights),
    )
    monkeypatch.setattr(compare, "target_networks", engines)
    memory = iter([PeakMemory(i * 1_000_000, 0, 0) for i in (1, 2, 3)])
    monkeypatch.setattr(compare, "peak_memory_of", lambda *arguments, gpu: next(memory))
    result = compare.benchmark_target(
        "cpu", {"unet": "fp32"}, BENCHMARK, IMAGE, workspace, MACHINE, device="cpu"
    )
    folder = workspace.benchmark("cpu")
    metrics, plot = workspace.metrics("benchmark", "cpu"), workspace.plot("benchmark", "cpu")
    write_benchmark(result, folder, metrics, plot)

    runs = BENCHMARK.warmup + BENCHMARK.repeats
    turn = [name for name in ("pytorch", "default", "engines") for _ in range(BENCHMARK.steps)]
    assert order == turn * runs
    # What has no engine runs as in the first baseline.
    options = {"torch_precision": "fp32", "workspace": workspace}
    assert made == [(("cpu", {"unet": "fp32"}, "cpu"), options)]
    assert read_benchmark(folder) == result
    assert result.bundles == {"unet": manifests.digest(workspace.bundle("cpu", "unet"))}
    # In order, also when read again: speedups are over the first.
    assert result.runners == ("pytorch", "compiled", "engines")
    assert [result.labels[name] for name in result.runners] == [
        "PyTorch eager, fp32",
        "torch.compile, default, fp32, channels last",
        "engines, cpu",
    ]
    total = {name: result.median(name, "total") for name in result.runners}
    assert result.images_per_second["engines"] == pytest.approx(1e3 / total["engines"])
    assert result.machine == MACHINE
    found = json.loads(metrics.read_text())
    assert found["peak_mb"] == 3
    assert found["speedup"] == pytest.approx(total["pytorch"] / total["engines"], abs=1e-3)
    with plot.open() as file:
        read = list(csv.DictReader(file))
    rows = [(row["runner"], row["phase"]) for row in read]
    assert len({row["timed"] for row in read}) == len(rows)  # a bar each in DVC's plot
    assert rows == [(r, p) for r in result.runners for p in (*PHASES, "denoiser_call")]


@pytest.mark.parametrize(
    ("name", "baseline", "error", "text"),
    [
        (
            "article",
            Baseline("fp16", autocast=True, compile=None, channels_last=False),
            HardwareError,
            r"baselines\.article\.autocast is for CUDA[\s\S]*found:    cpu",
        ),
        (
            "engines",
            BENCHMARK.baselines["pytorch"],
            ConfigError,
            r"baselines\.engines: ",
        ),
    ],
)
def test_baselines_that_cannot_be_are_refused_before_anything_runs(
    tmp_path: Path, name: str, baseline: Baseline, error: type[Exception], text: str
) -> None:
    wrong = replace(BENCHMARK, baselines=BENCHMARK.baselines | {name: baseline})
    with pytest.raises(error, match=text):
        compare.benchmark_target("cpu", {}, wrong, IMAGE, Workspace(tmp_path), {}, device="cpu")
