"""Time engines and PyTorch in turns, in one run, and weigh each in a process of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines import config, manifests
from diffusion_engines.bench.breakdown import samples_of, summarize
from diffusion_engines.bench.memory import PeakMemory, peak_memory_of
from diffusion_engines.bench.results import OTHER_ENGINES, Benchmark
from diffusion_engines.config import ENGINES
from diffusion_engines.errors import ConfigError, HardwareError
from diffusion_engines.families.base import Network
from diffusion_engines.layout import Workspace
from diffusion_engines.progress import progress, step
from diffusion_engines.runtime.assemble import target_networks, torch_networks
from diffusion_engines.runtime.sampling import (
    Durations,
    Settings,
    initial_latents,
    load_model,
    sample,
)

# What loads the networks of a runner.
Maker = Callable[[], dict[str, Network]]


@dataclass(frozen=True)
class TimedEngines:
    """A target, and the components that have an engine, with their precisions."""

    target: str
    components: Mapping[str, str]


def benchmark_target(
    target: str,
    components: Mapping[str, str],
    settings: config.Benchmark,
    image: config.Image,
    workspace: Workspace,
    machine: Mapping[str, Any],
    *,
    device: str,
    beside: TimedEngines | None = None,
) -> Benchmark:
    """Measure latencies by phase, peak memory and throughput of engines and of every baseline.

    They take turns, run by run, so that a machine that slows down slows all of them.

    Args:
        target: whose bundles.
        components: those that have an engine, with their precisions.
        settings: prompt, steps, repeats, baselines.
        image: size and batch.
        workspace: has the bundles, and weights of what has no engine.
        machine: this one, which the result carries.
        device: where the networks run.
        beside: another target for this machine, whose engines take their turns too.

    Raises:
        ConfigError: a baseline has the name of engines.
        HardwareError: autocast is asked for where it does not exist.
    """
    _check_baselines(settings, device)
    makers = _makers(TimedEngines(target, components), beside, settings, workspace, device)
    run = functools.partial(
        _sample_once, settings=settings, image=image, weights=workspace.weights, device=device
    )
    timed = _time(makers, run, settings)
    latency = {name: summarize(durations) for name, durations in timed.items()}
    memory: dict[str, PeakMemory] = {}
    for name, make in makers.items():
        with step(f"peak memory of {name}"):
            memory[name] = peak_memory_of(_make_and_run, make, run, gpu=device != "cpu")
    return Benchmark(
        target=target,
        runners=tuple(makers),
        labels={name: baseline.label for name, baseline in settings.baselines.items()}
        | {ENGINES: f"engines, {target}"}
        | ({OTHER_ENGINES: f"engines, {beside.target}"} if beside else {}),
        latency=latency,
        memory=memory,
        images_per_second={
            name: image.batch_size * 1e3 / phases["total"]["median_ms"]
            for name, phases in latency.items()
        },
        machine=machine,
        components=components,
        settings=settings,
        bundles=_digests(workspace, target, components),
        beside=_digests(workspace, beside.target, beside.components) if beside else None,
        samples={name: samples_of(durations) for name, durations in timed.items()},
    )


def _digests(workspace: Workspace, target: str, components: Iterable[str]) -> dict[str, str]:
    return {name: manifests.digest(workspace.bundle(target, name)) for name in components}


def _check_baselines(settings: config.Benchmark, device: str) -> None:
    for name in (ENGINES, OTHER_ENGINES):
        if name in settings.baselines:
            raise ConfigError(
                f"benchmark.baselines.{name}: this is the name of what baselines are compared with",
                fix="give the baseline another name (conf/benchmark/)",
            )
    for name, baseline in settings.baselines.items():
        if baseline.autocast and not device.startswith("cuda"):
            raise HardwareError(
                f"benchmark.baselines.{name}.autocast is for CUDA",
                expected="cuda",
                found=device,
                fix="set it to false (conf/benchmark/), or measure a target with a GPU",
            )


def _makers(
    engines: TimedEngines,
    beside: TimedEngines | None,
    settings: config.Benchmark,
    workspace: Workspace,
    device: str,
) -> dict[str, Maker]:
    """Return what loads each runner: the baselines in their order, then the engines."""
    makers: dict[str, Maker] = {
        name: functools.partial(_torch_runner, baseline, workspace.weights, device)
        for name, baseline in settings.baselines.items()
    }
    # What has no engine runs in PyTorch, in the precision of the first baseline.
    first = next(iter(settings.baselines.values()))
    for name, one in ((OTHER_ENGINES, beside), (ENGINES, engines)):
        if one is not None:
            makers[name] = functools.partial(
                target_networks,
                one.target,
                dict(one.components),
                device,
                workspace=workspace,
                torch_precision=first.precision,
            )
    return makers


def _torch_runner(baseline: config.Baseline, weights: Path, device: str) -> dict[str, Network]:
    return torch_networks(
        baseline.precision,
        device,
        weights=weights,
        autocast=baseline.autocast,
        compile_mode=baseline.compile,
        channels_last=baseline.channels_last,
    )


def _time(
    makers: Mapping[str, Maker],
    run: Callable[[Mapping[str, Network]], Durations],
    settings: config.Benchmark,
) -> dict[str, list[Durations]]:
    """Return the durations of each runner's runs, without those that warm it up."""
    runners = {name: make() for name, make in makers.items()}
    runs: dict[str, list[Durations]] = {name: [] for name in runners}
    with step(f"{settings.warmup} + {settings.repeats} runs of {settings.steps} steps, each"):
        for index in progress(range(settings.warmup + settings.repeats), "benchmark"):
            for name, networks in runners.items():
                durations = run(networks)
                if index >= settings.warmup:
                    runs[name].append(durations)
    return runs


def _sample_once(
    networks: Mapping[str, Network],
    *,
    settings: config.Benchmark,
    image: config.Image,
    weights: Path,
    device: str,
) -> Durations:
    model = load_model(weights)
    sampling = Settings(
        scheduler=settings.scheduler,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        height=image.height,
        width=image.width,
        vae_scale_factor=image.vae_scale_factor,
        guidance=image.guidance,
    )
    seeds = [settings.seed + i for i in range(image.batch_size)]
    noise = initial_latents(model, sampling, seeds)
    prompts = [settings.prompt] * image.batch_size
    result = sample(
        networks, model, sampling, prompts, noise, seeds=seeds, device=device, trajectory=False
    )
    return result.durations


def _make_and_run(make: Maker, run: Callable[[Mapping[str, Network]], Durations]) -> None:
    networks = make()
    with step("sample once"):
        run(networks)
