"""Time engines and PyTorch alternately in one run, and weigh each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_engines import layout
from diffusion_engines.bench.breakdown import rows, summarize
from diffusion_engines.bench.memory import peak_memory_of
from diffusion_engines.config import Benchmark, Image
from diffusion_engines.errors import HardwareError
from diffusion_engines.files import read_json, write_json, write_table
from diffusion_engines.progress import progress, step
from diffusion_engines.runtime.assemble import target_networks, torch_networks
from diffusion_engines.runtime.conditioning import Network
from diffusion_engines.runtime.sampling import (
    Settings,
    Timings,
    initial_latents,
    load_model,
    sample,
)


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
    """Write latencies by phase, peak memory and throughput of engines and PyTorch.

    The two alternate, run by run, so that a machine that slows down slows both.

    Args:
        target: whose bundles.
        components: those that have an engine, with their precisions.
        benchmark: prompt, steps, repeats, baseline.
        image: size and batch.
        folder: gets ``benchmark.json``.
        metrics: gets the medians.
        plot: gets the latencies by phase as a table.
        device: where the networks run.

    Raises:
        HardwareError: autocast is asked for where it does not exist.
    """
    if benchmark.baseline_autocast and not device.startswith("cuda"):
        raise HardwareError(
            "benchmark.baseline_autocast is for CUDA", expected="cuda", found=device
        )
    arguments = (target, dict(components), benchmark, device)
    runners = {"pytorch": _torch_runner(*arguments), "engines": _engine_runner(*arguments)}
    runs: dict[str, list[Timings]] = {name: [] for name in runners}
    with step(f"{benchmark.warmup} + {benchmark.repeats} runs of {benchmark.steps} steps, each"):
        for index in progress(range(benchmark.warmup + benchmark.repeats), "benchmark"):
            for name, networks in runners.items():
                timings = _sample_once(networks, benchmark, image, device)
                if index >= benchmark.warmup:
                    runs[name].append(timings)
    del runners
    memory = {}
    for name, make in (("pytorch", _torch_runner), ("engines", _engine_runner)):
        with step(f"peak memory of {name}"):
            memory[name] = peak_memory_of(_sample_for_memory, make, arguments, benchmark, image)

    summaries = {name: summarize(timings) for name, timings in runs.items()}
    table = [row for name, summary in summaries.items() for row in rows(name, summary)]
    write_table(plot, table)
    total = {name: summary["total"]["median_ms"] for name, summary in summaries.items()}
    call = {name: summary["unet_call"]["median_ms"] for name, summary in summaries.items()}
    throughput = {name: image.batch_size * 1e3 / value for name, value in total.items()}
    details: dict[str, Any] = {
        "latency": summaries,
        "memory": memory,
        "images_per_second": throughput,
        "machine": read_json(layout.MACHINE),
        "components": dict(components),
        "baseline": f"PyTorch eager {benchmark.baseline_precision}"
        + (" with autocast" if benchmark.baseline_autocast else ""),
        "settings": vars(benchmark),
    }
    write_json(folder / "benchmark.json", details)
    write_json(
        metrics,
        {
            "total_ms": total["engines"],
            "unet_ms": call["engines"],
            "speedup": round(total["pytorch"] / total["engines"], 3),
            "unet_speedup": round(call["pytorch"] / call["engines"], 3),
            "peak_mb": round(memory["engines"]["gpu" if device != "cpu" else "resident"] / 1e6),
        },
    )


def _torch_runner(
    target: str, components: dict[str, str], benchmark: Benchmark, device: str
) -> dict[str, Network]:
    return torch_networks(
        benchmark.baseline_precision, device, autocast=benchmark.baseline_autocast
    )


def _engine_runner(
    target: str, components: dict[str, str], benchmark: Benchmark, device: str
) -> dict[str, Network]:
    return target_networks(target, components, device, torch_precision=benchmark.baseline_precision)


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
    make: Any, arguments: tuple[Any, ...], benchmark: Benchmark, image: Image
) -> None:
    networks = make(*arguments)
    device = arguments[-1]
    with step("sample once"):
        _sample_once(networks, benchmark, image, device)
