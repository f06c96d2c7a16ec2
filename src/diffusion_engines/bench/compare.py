"""Time engines and PyTorch in turns, in one run, and weigh each in a process of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusion_engines import layout
from diffusion_engines.bench.breakdown import rows, summarize
from diffusion_engines.bench.memory import peak_memory_of
from diffusion_engines.config import Baseline, Benchmark, Image
from diffusion_engines.errors import HardwareError
from diffusion_engines.families.base import Network
from diffusion_engines.files import read_json, write_json, write_table
from diffusion_engines.layout import Workspace
from diffusion_engines.progress import progress, step
from diffusion_engines.runtime.assemble import target_networks, torch_networks
from diffusion_engines.runtime.sampling import (
    Settings,
    Timings,
    initial_latents,
    load_model,
    sample,
)

# The runner that is no baseline.
ENGINES = "engines"


def benchmark_target(
    target: str,
    components: Mapping[str, str],
    benchmark: Benchmark,
    image: Image,
    folder: Path,
    metrics: Path,
    plot: Path,
    *,
    device: str,
) -> None:
    """Write latencies by phase, peak memory and throughput of engines and of every baseline.

    They take turns, run by run, so that a machine that slows down slows all of them.

    Args:
        target: whose bundles.
        components: those that have an engine, with their precisions.
        benchmark: prompt, steps, repeats, baselines.
        image: size and batch.
        folder: gets ``benchmark.json``.
        metrics: gets the medians.
        plot: gets the latencies by phase as a table.
        device: where the networks run.

    Raises:
        HardwareError: autocast is asked for where it does not exist.
        IntegrityError: the machine was not probed.
    """
    if not device.startswith("cuda"):
        for name, baseline in benchmark.baselines.items():
            if baseline.autocast:
                raise HardwareError(
                    f"benchmark.baselines.{name}.autocast is for CUDA",
                    expected="cuda",
                    found=device,
                    fix="set it to false (conf/benchmark/), or measure a target with a GPU",
                )
    machine = read_json(layout.MACHINE)
    makers: dict[str, Callable[[], dict[str, Network]]] = {
        name: functools.partial(_torch_runner, baseline, device)
        for name, baseline in benchmark.baselines.items()
    }
    # What has no engine runs in PyTorch, in the precision of the first baseline.
    first, baseline = next(iter(benchmark.baselines.items()))
    makers[ENGINES] = functools.partial(
        target_networks,
        Workspace(),
        target,
        dict(components),
        device,
        torch_precision=baseline.precision,
    )
    runners = {name: make() for name, make in makers.items()}
    runs: dict[str, list[Timings]] = {name: [] for name in runners}
    with step(f"{benchmark.warmup} + {benchmark.repeats} runs of {benchmark.steps} steps, each"):
        for index in progress(range(benchmark.warmup + benchmark.repeats), "benchmark"):
            for name, networks in runners.items():
                timings = _sample_once(networks, benchmark, image, device)
                if index >= benchmark.warmup:
                    runs[name].append(timings)
    del runners, networks
    memory = {}
    for name, make in makers.items():
        with step(f"peak memory of {name}"):
            memory[name] = peak_memory_of(_sample_for_memory, make, benchmark, image, device)

    summaries = {name: summarize(timings) for name, timings in runs.items()}
    table = [row for name, summary in summaries.items() for row in rows(name, summary)]
    write_table(plot, table)
    total = {name: summary["total"]["median_ms"] for name, summary in summaries.items()}
    call = {name: summary["denoiser_call"]["median_ms"] for name, summary in summaries.items()}
    details: dict[str, Any] = {
        # A list, because JSON's keys are sorted and the first is what speedups are over.
        "runners": [[name, b.label] for name, b in benchmark.baselines.items()]
        + [[ENGINES, f"engines, {target}"]],
        "latency": summaries,
        "memory": memory,
        "images_per_second": {n: image.batch_size * 1e3 / value for n, value in total.items()},
        "machine": machine,
        "components": dict(components),
        "settings": asdict(benchmark),
    }
    write_json(folder / "benchmark.json", details)
    write_json(
        metrics,
        {
            "total_ms": total[ENGINES],
            "denoiser_ms": call[ENGINES],
            "speedup": round(total[first] / total[ENGINES], 3),
            "denoiser_speedup": round(call[first] / call[ENGINES], 3),
            "peak_mb": round(memory[ENGINES]["gpu" if device != "cpu" else "resident"] / 1e6),
        },
    )


def _torch_runner(baseline: Baseline, device: str) -> dict[str, Network]:
    return torch_networks(
        baseline.precision,
        device,
        weights=Workspace().weights,
        autocast=baseline.autocast,
        compile_mode=baseline.compile,
        channels_last=baseline.channels_last,
    )


def _sample_once(
    networks: Mapping[str, Network], benchmark: Benchmark, image: Image, device: str
) -> Timings:
    model = load_model(layout.WEIGHTS)
    settings = Settings(
        scheduler=benchmark.scheduler,
        steps=benchmark.steps,
        guidance_scale=benchmark.guidance_scale,
        height=image.height,
        width=image.width,
        vae_scale_factor=image.vae_scale_factor,
        guidance=image.guidance,
    )
    seeds = [benchmark.seed + i for i in range(image.batch_size)]
    noise = initial_latents(model, settings, seeds)
    prompts = [benchmark.prompt] * image.batch_size
    return sample(networks, model, settings, prompts, noise, seeds=seeds, device=device).timings


def _sample_for_memory(
    make: Callable[[], dict[str, Network]], benchmark: Benchmark, image: Image, device: str
) -> None:
    networks = make()
    with step("sample once"):
        _sample_once(networks, benchmark, image, device)
