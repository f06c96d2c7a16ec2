"""How close a target's engines come to the limits of the GPU: `make bench-gpu TARGET=h100`.

After the target was built. Times one call of the denoiser, one step, and whole pictures with each
scheduler, beside PyTorch as one would run it without engines, in one run. Prints a table and writes
it with all that it depends on as JSON. Inputs are random; results are compared with fp32 PyTorch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.bench.breakdown import phase_milliseconds
from diffusion_engines.families import family_of
from diffusion_engines.layout import Workspace
from diffusion_engines.runtime.assemble import TorchNetwork, engine_networks
from diffusion_engines.runtime.cuda_graphs import capture, cuda
from diffusion_engines.runtime.networks import example_inputs, load_network, precision_dtype
from diffusion_engines.runtime.sampling import Settings, initial_latents, load_model, sample

PROMPT = "A big banana leaf with lemons in front of it"
Row = tuple[str, str, float]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--calls", type=int, default=60, help="timed calls of the denoiser")
    parser.add_argument("--runs", type=int, default=5, help="timed pictures of each kind")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batches", type=int, nargs="*", help="time these batches alone")
    parser.add_argument("--baselines", choices=["none", "eager", "compiled"], default="compiled")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    options = parser.parse_args()
    workspace = Workspace()
    before = gpu_state()
    rows: list[Row] = []
    for row in measure(workspace, options):
        rows.append(row)
        print(f"{row[0]:<46} {row[1]:<34} {row[2]:10.3f}", flush=True)
    result = {
        "target": options.target,
        "torch": torch.__version__,
        "before": before,
        "after": gpu_state(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(workspace: Workspace, options: argparse.Namespace) -> Iterator[Row]:
    """Yield what was measured, as (what, of which, milliseconds or what the name says)."""
    family = family_of(workspace.weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.batches:
        yield from first_picture(workspace.bundles(options.target), options.steps)
    networks: dict[str, Any] = engine_networks(
        options.target, family.components, device, workspace=workspace
    )
    if options.batches:
        yield from throughput(workspace, networks, device, options)
        return
    engine = networks[family.denoiser.name]
    inputs = random_inputs(engine, device)
    yield from denoiser_calls(workspace, engine, inputs, options)
    model = load_model(workspace.weights)
    sizes = engine.inputs[0]
    factor = family.pixels_per_latent(model.configs)
    call = statistics.median(times(lambda: engine(*inputs), options.calls))
    kinds = [(name, options.steps) for name in family.schedulers] + [("lms", 100)]
    for scheduler, steps in kinds:
        settings = Settings(
            scheduler,
            steps,
            7.5,
            sizes.axis("height").usual * factor,
            sizes.axis("width").usual * factor,
            factor,
        )
        noise = initial_latents(model, settings, [0])
        phases: list[Mapping[str, float]] = []
        for _ in range(options.runs + 1):
            made = sample(
                networks,
                model,
                settings,
                [PROMPT],
                noise,
                seeds=[0],
                device=device,
                trajectory=False,
            )
            assert torch.isfinite(made.images).all()
            phases.append(phase_milliseconds(made.durations))
        for name in ("encoding", "denoising_loop", "decoding", "total"):
            value = statistics.median(phase[name] for phase in phases[1:])
            yield f"picture, {steps} steps, {scheduler}: {name}", "engines, ms", value
            if name == "denoising_loop":
                yield f"a step beyond the call, {scheduler}", "engines, ms", value / steps - call
    yield from pictures_of_diffusers(workspace, device, options)


def throughput(
    workspace: Workspace, networks: Mapping[str, Any], device: str, options: argparse.Namespace
) -> Iterator[Row]:
    """Make pictures in batches, and name the knee: from there, larger ones gain no twentieth more.

    The engines have to take them: ``export=dynamic export.dynamic.batch_size=[1,32]``.
    """
    family, model = family_of(workspace.weights), load_model(workspace.weights)
    sizes = networks[family.denoiser.name].inputs[0]
    factor = family.pixels_per_latent(model.configs)
    edges = [sizes.axis(name).usual * factor for name in ("height", "width")]
    name = next(iter(family.schedulers))
    settings = Settings(name, options.steps, 7.5, edges[0], edges[1], factor)
    rates: dict[int, float] = {}
    for count in options.batches:
        seeds = [*range(count)]
        noise = initial_latents(model, settings, seeds)

        def make(noise: torch.Tensor = noise, seeds: list[int] = seeds) -> None:
            made = sample(
                networks,
                model,
                settings,
                [PROMPT] * len(seeds),
                noise,
                seeds=seeds,
                device=device,
                trajectory=False,
            )
            assert torch.isfinite(made.images).all()

        free = cuda.mem_get_info()[0] if device == "cuda" else 0
        make()
        taken = (free - cuda.mem_get_info()[0]) / 1e9 if device == "cuda" else float("nan")
        milliseconds = wall(make, options.runs)
        rates[count] = count / milliseconds * 1e3
        what = f"{count} picture(s) a call, {options.steps} steps"
        yield what, "ms a picture", milliseconds / count
        yield what, "pictures a second", rates[count]
        yield what, "GB more than before", taken
    best = max(rates.values())
    yield "the knee", "pictures a call", min(n for n, rate in rates.items() if rate > 0.95 * best)


def denoiser_calls(
    workspace: Workspace, engine: Any, inputs: list[torch.Tensor], options: argparse.Namespace
) -> Iterator[Row]:
    """Time one call: the engine, and PyTorch with and without a CUDA graph."""
    family = family_of(workspace.weights)
    component, precision = family.denoiser, engine.manifest.precision
    device = inputs[0].device.type
    weights = workspace.weights / component.folder
    exact = torch_network(load_network(component, weights, "fp32", device), component, "fp32")
    expected = exact(*inputs)
    del exact

    def error(found: torch.Tensor) -> float:
        return float((found.float() - expected).norm() / expected.norm())

    # Twice, with other inputs between: a result that stays from the last call is none.
    engine(*random_inputs(engine, device, seed=1))
    yield "denoiser, relative L2 to fp32", "engine", error(engine(*inputs))
    yield from spread("denoiser, one call", "engine", lambda: engine(*inputs), options.calls)
    if options.baselines == "none":
        return
    module: Any = load_network(component, weights, precision, device)
    module = module.to(memory_format=torch.channels_last)
    eager = torch_network(module, component, precision)
    yield "denoiser, relative L2 to fp32", "PyTorch eager", error(eager(*inputs))
    yield from spread("denoiser, one call", "PyTorch eager", lambda: eager(*inputs), options.calls)
    if device == "cuda":
        replay = graphed(lambda: eager(*inputs))
        yield from spread("denoiser, one call", "PyTorch in a CUDA graph", replay, options.calls)
    if options.baselines == "compiled":
        compiled = torch_network(torch.compile(module), component, precision)
        compiled(*inputs)
        if device == "cuda":
            replay = graphed(lambda: compiled(*inputs))
            name = "torch.compile in a CUDA graph"
            yield from spread("denoiser, one call", name, replay, options.calls)


def pictures_of_diffusers(
    workspace: Workspace, device: str, options: argparse.Namespace
) -> Iterator[Row]:
    """Time the article's benchmark, 100 steps of LMS, as diffusers runs it."""
    if options.baselines == "none":
        return
    diffusers: Any = importlib.import_module("diffusers")  # untyped
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
        workspace.weights, dtype=dtype, use_safetensors=True
    ).to(device)
    pipe.scheduler = diffusers.LMSDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    steps = 100 if device == "cuda" else 2

    def once() -> None:
        pipe(PROMPT, num_inference_steps=steps, output_type="pt")

    once()
    yield f"picture, {steps} steps, lms: total", "diffusers, eager, ms", wall(once, 2)
    if options.baselines == "compiled":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead")
        once()
        name = "diffusers, torch.compile, ms"
        yield f"picture, {steps} steps, lms: total", name, wall(once, 2)


def first_picture(bundles: Path, steps: int) -> Iterator[Row]:
    """Time a new process up to its first picture, twice: then the files are in memory."""
    code = (
        "import sys; from diffusion_engines import load_pipeline\n"
        "pipe = load_pipeline(sys.argv[1])\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        f"pipe({PROMPT!r}, num_inference_steps={steps}, output_type='pil').images[0].load()"
    )
    for kind in ("first time", "again"):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(bundles)], check=True)
        yield f"process start to first picture, {kind}", "s", time.perf_counter() - started


def torch_network(module: Any, component: Any, precision: str) -> TorchNetwork:
    """Return a network that casts its inputs, as engines do."""
    return TorchNetwork(
        module, [value.dtype for value in component.takes], precision_dtype(precision)
    )


def random_inputs(engine: Any, device: str, seed: int = 0) -> list[torch.Tensor]:
    """Return seeded inputs of an engine's sizes."""
    manifest = engine.manifest
    inputs = example_inputs(manifest.inputs, manifest.precision, seed=seed)
    return [value.to(device) for value in inputs]


def spread(what: str, of: str, call: Callable[[], Any], count: int) -> Iterator[Row]:
    """Yield median and smallest of the milliseconds of repeated calls."""
    taken = times(call, count)
    yield what, f"{of}, ms", statistics.median(taken)
    yield f"{what}, smallest", f"{of}, ms", min(taken)


def times(call: Callable[[], Any], count: int) -> list[float]:
    """Return the milliseconds of each of ``count`` calls, after some that are not timed."""
    for _ in range(3):
        call()
    if not torch.cuda.is_available():
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            call()
            taken.append((time.perf_counter() - started) * 1e3)
        return taken
    events: list[tuple[Any, Any]] = []
    for _ in range(count):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def wall(call: Callable[[], Any], count: int) -> float:
    """Return the median of the milliseconds of calls, of which each waits for the GPU."""
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Record a call as a CUDA graph and return what replays it."""
    with torch.no_grad():
        graph, held = capture(call, warmup=3)

    def replay() -> Any:
        graph.replay()
        return held

    return replay


@contextmanager
def nvml() -> Iterator[Any]:
    """Give the driver's library."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def gpu_state() -> Mapping[str, Any]:
    """Return what timings depend on: card, driver, limits, clocks, other processes, throttling."""
    if not torch.cuda.is_available():
        return {"gpu": None}
    with nvml() as library:
        card = library.nvmlDeviceGetHandleByIndex(0)
        try:
            mig = library.nvmlDeviceGetMigMode(card)[0]
        except library.NVMLError:
            mig = 0
        return {
            "gpu": library.nvmlDeviceGetName(card),
            "driver": library.nvmlSystemGetDriverVersion(),
            "power_limit_w": library.nvmlDeviceGetPowerManagementLimit(card) / 1e3,
            "sm_mhz": library.nvmlDeviceGetClockInfo(card, library.NVML_CLOCK_SM),
            "sm_mhz_max": library.nvmlDeviceGetMaxClockInfo(card, library.NVML_CLOCK_SM),
            "temperature_c": library.nvmlDeviceGetTemperature(card, library.NVML_TEMPERATURE_GPU),
            "mig": bool(mig),
            "throttle_reasons": hex(library.nvmlDeviceGetCurrentClocksThrottleReasons(card)),
            "processes": len(library.nvmlDeviceGetComputeRunningProcesses(card)),
        }


if __name__ == "__main__":
    main()
