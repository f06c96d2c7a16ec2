"""Artifacts of a fleet, as small as they can be, written by what writes them in the stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_engines import config, manifests
from diffusion_engines.bench.breakdown import samples_of, summarize
from diffusion_engines.bench.memory import PeakMemory
from diffusion_engines.bench.results import OTHER_ENGINES, Benchmark, write_benchmark
from diffusion_engines.config import ENGINES
from diffusion_engines.families.base import Dim, TensorSpec
from diffusion_engines.files import write_json
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import this_machine
from diffusion_engines.onnx.statistics import (
    GraphStatistics,
    Simplification,
    write_simplification,
)
from diffusion_engines.parity.distances import Difference
from diffusion_engines.parity.gates import misses_of, misses_of_component, misses_of_latents
from diffusion_engines.parity.results import (
    ComponentParity,
    GraphCheck,
    GraphParity,
    ImageParity,
    LatentsParity,
    Quantization,
    Validation,
    write_graph_check,
    write_quantization,
    write_validation,
)
from diffusion_engines.parity.scorers import Scores
from diffusion_engines.precisions import graph_name
from diffusion_engines.report.images import write_trajectory
from diffusion_engines.runtime.recording import write_settings
from diffusion_engines.runtime.sampling import Durations, Settings
from tests.manifests import engine_manifest, graph_manifest

STEPS = 3
PROMPTS = ["lemons & <script>alert(1)</script>", "cherries"]
CALLS = {"text_encoder": 4, "unet": 2 * STEPS, "vae_decoder": 2}
GATE = config.Gate(rel_l2=1e-4, max_abs=1e-3, cosine=0.99999)
LATENTS_GATE = config.LatentsGate(rel_l2=2e-3, cosine=0.9999)
IMAGE_GATE = config.ImageGate(psnr=60.0, ssim=0.999)
NOT_SCORED = {
    name: Scores(missing=f"models/scorers/{name} is not there") for name in ("lpips", "clip")
}
PYTORCH = config.Baseline("fp32", autocast=False, compile=None, channels_last=False)


@dataclass(frozen=True)
class Made:
    """What ``write_report`` takes."""

    workspace: Workspace
    folder: Path
    arguments: dict[str, Any]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 8), (shade, 40, 90))


def write_reference(workspace: Workspace) -> None:
    folder = workspace.reference
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings("lms", STEPS, 7.5, height=8, width=16)
    write_settings(folder, settings, PROMPTS, seed=42, batch_size=1, frame_steps=[0, 1, STEPS])
    for index in range(3):
        picture(100).save(folder / f"frame-{index:02d}.png")  # equal, on purpose
    for index in range(2):
        picture(100).save(folder / f"image-{index:02d}.png")


def write_engine(workspace: Workspace, engine: config.Engine, batch: int | Dim) -> None:
    name = f"{engine.target}-{engine.component}"
    inputs = [TensorSpec("input_0", "latents", "component", (batch, 4, 8))]
    folder = workspace.engine(engine.target, engine.component)
    folder.mkdir(parents=True, exist_ok=True)
    for file, size in (("engine.onnx", 1000), ("engine.onnx.data", 2500)):
        (folder / file).write_bytes(bytes(size))
    graph = graph_manifest(
        engine.component, engine.precision, inputs, name=engine.graph, simplify_rel_l2=0.0
    )
    manifest = engine_manifest(
        name,
        graph,
        dtypes={engine.precision: 7},
        fingerprint={"compute_capabilities": ["12.0", "8.9"]},
        settings={"backend": "onnxruntime", "build": {"optimization_level": "all"}},
    )
    manifests.write(folder, manifest)
    steps = [("check the files", 1.0, 10), ("build it", 2.5, 4_000_000_000)]
    write_json(
        workspace.log("build", name) / "resources.json",
        [{"step": s, "seconds": t, "peak_memory_bytes": m} for s, t, m in steps],
    )


def write_operators(workspace: Workspace, name: str, macs: int | None) -> None:
    found = Simplification(
        GraphStatistics({"Conv": 3, "Add": 9}, 12, 5000, macs),
        GraphStatistics({"Conv": 3, "Add": 4}, 7, 4000, macs),
    )
    write_simplification(found, workspace.operators(name))


def write_check(workspace: Workspace, name: str, *, unchecked: bool = False) -> None:
    calls = () if unchecked else (Difference(5e-4, 1e-3, 0.9999999, 0),) * 4
    gate = config.Gate(rel_l2=4e-3, max_abs=5e-2, cosine=0.9999)
    misses = tuple(misses_of_component(name, gate, calls))
    write_graph_check(GraphCheck(name, gate, calls, misses), workspace.parity(name))


def write_costs(workspace: Workspace, name: str, source: str, calls: tuple[float, ...]) -> None:
    """The costs of a quantized graph; its source is a hundred times as exact."""
    parity = GraphParity(
        tuple(Difference(value / 100, 1.0, 1.0, 0) for value in calls),
        tuple(Difference(value, 1.0, 1.0, 0) for value in calls),
    )
    result = Quantization(
        name=name,
        source=source,
        calls=16,
        allowed=0.1,
        bytes=7000,
        lowered={"Conv": 40, "MatMul": 60},
        kept={"Conv": 2},
        parity=parity,
        misses=tuple(parity.misses(0.1)),
    )
    folder = workspace.quantization(name)
    write_quantization(result, folder, workspace.metrics("quantize", name))


def write_parity(
    workspace: Workspace,
    target: str,
    components: dict[str, str],
    rel_l2: float,
    scores: dict[str, Scores],
) -> None:
    """The same distance everywhere; infinite where a value of an engine is not finite."""
    found = Difference(rel_l2, 1e-4, 0.999999, int(rel_l2 == float("inf")))
    parts = []
    for name, precision in components.items():
        calls = (found,) * CALLS[name]
        misses = misses_of_component(f"{name} ({precision})", GATE, calls)
        parts.append(ComponentParity(name, precision, GATE, calls, tuple(misses)))
    runs = ((found,) * STEPS,) * 2
    lpips, clip = scores["lpips"], scores["clip"]
    images = []
    for index, values in enumerate(({"psnr": 100.0, "ssim": 1.0}, {"psnr": 61.5, "ssim": 0.9995})):
        images.append(
            ImageParity(
                file=f"image-{index:02d}.png",
                **values,
                misses=tuple(misses_of(f"image {index}", asdict(IMAGE_GATE), values)),
                lpips=lpips.images[index] if lpips.images else None,
                clip=clip.images[index] if clip.images else None,
                clip_reference=clip.reference[index] if clip.reference else None,
            )
        )
    result = Validation(
        target=target,
        components=tuple(parts),
        latents=LatentsParity(LATENTS_GATE, runs, tuple(misses_of_latents(LATENTS_GATE, runs))),
        image_gate=IMAGE_GATE,
        images=tuple(images),
        not_scored={name: one.missing for name, one in scores.items() if one.missing},
        bundles=bundles_of(workspace, target, components),
    )
    folder = workspace.validation(target)
    folder.mkdir(parents=True, exist_ok=True)
    write_validation(
        result,
        [picture(100 + 3 * index) for index in range(2)],
        folder,
        workspace.metrics("validate", target),
        workspace.plots("validate", target),
    )


def bundles_of(workspace: Workspace, target: str, components: dict[str, str]) -> dict[str, str]:
    """What the stages record of the bundles that they measured."""
    return {
        name: manifests.digest(folder)
        for name in components
        if (folder := workspace.bundle(target, name)).is_dir()
    }


def write_latencies(
    workspace: Workspace,
    target: str,
    components: dict[str, str],
    gpus: list[str],
    baselines: dict[str, config.Baseline],
    *,
    beside: str | None = None,
    seconds: float = 0.024,
) -> None:
    """Engines that need 24 ms, half of it in one UNet call, and baselines that need 60 ms.

    ``beside``: a target that they are an alternative to, which needs 24 ms, too.
    """

    def runs(name: str, count: int) -> list[Durations]:
        total = {ENGINES: seconds, OTHER_ENGINES: 0.024}.get(name, 0.060)
        return [Durations(0.1 * total, 0.8 * total, [0.5 * total], 0.1 * total)] * count

    runners = (*baselines, *([OTHER_ENGINES] if beside else []), ENGINES)
    settings = config.Benchmark(
        prompt="lemons",
        scheduler="lms",
        steps=STEPS,
        guidance_scale=7.5,
        seed=0,
        warmup=1,
        repeats=5,
        baselines=baselines,
    )
    result = Benchmark(
        target=target,
        runners=runners,
        labels={name: baseline.label for name, baseline in baselines.items()}
        | {ENGINES: f"engines, {target}"}
        | ({OTHER_ENGINES: f"engines, {beside}"} if beside else {}),
        latency={name: summarize(runs(name, 1)) for name in runners},
        samples={name: samples_of(runs(name, 5)) for name in runners},
        memory={
            name: PeakMemory(2_000_000_000, 3_000_000_000 if gpus else 0, 1_000_000 if gpus else 0)
            for name in runners
        },
        images_per_second={name: 83.3 if name == ENGINES else 33.3 for name in runners},
        machine=this_machine() | {"cpu": "Testor 9000", "cores": 4, "memory_gib": 16, "gpus": gpus},
        components=components,
        settings=settings,
        bundles=bundles_of(workspace, target, components),
        beside=bundles_of(workspace, beside, dict.fromkeys(CALLS, "")) if beside else None,
    )
    write_benchmark(
        result,
        workspace.benchmark(target),
        workspace.metrics("benchmark", target),
        workspace.plot("benchmark", target),
    )


def write_generated(workspace: Workspace, target: str, count: int, *, animated: bool) -> None:
    """Images as the stage `generate` leaves them."""
    settings = {"scheduler": "euler", "steps": 9, "guidance_scale": 5.0, "height": 8, "width": 16}
    prompts = [f"fruit number {index}" for index in range(count)]
    folder = workspace.images(target)
    write_json(folder / "durations.json", settings | {"prompts": prompts, "seed": 7})
    for index in range(count):
        path = folder / f"image-{index:02d}.png"
        picture(20 * index).save(path)
        if animated:
            write_trajectory(path.with_suffix(".gif"), [path] * 3, [0, 4, 9])


def sections(
    engines: dict[str, str], measure: list[str], source: str, quantized: dict[str, str]
) -> dict[str, Any]:
    """The report's sections of params.yaml; ``engines`` are names with their precisions.

    ``quantized`` are names such as "unet-int8" with the precision of their source.
    """
    split = {name: name.split("-", 1) for name in engines}
    model = {
        "name": "toy",
        "source": source,
        "folder": "conf/toy",
        "checkpoint": "conf/toy",
        "repo": "someone/toy",
        "revision": "0123456789abcdef",
        "seed": 0,
        "dtype": "fp32",
        "clip_skip": 0,
        "parameters": {"unet": 1_500_000},
        "lora_folder": "loras",
        "loras": [],
        "embeddings": [],
    }
    values = {
        "model": model,
        "image": {"height": 64, "width": 64, "batch_size": 1, "vae_scale_factor": 8},
        "graphs": {
            name: {
                "component": component,
                "weights": "vae" if component == "vae_decoder" else component,
                "precision": precision,
                "source": f"{component}-{quantized[name]}" if name in quantized else None,
            }
            for component, precision in dict.fromkeys(
                (component, engines[name]) for name, (_, component) in split.items()
            )
            for name in [graph_name(component, precision)]
        },
        "engines": {
            name: {
                "target": target,
                "backend": "onnxruntime",
                "component": component,
                "precision": engines[name],
                "graph": graph_name(component, engines[name]),
                **dict.fromkeys(
                    ("graph_folder", "code", "shared", "wrap_code", "wrap_weights"), "a path"
                ),
            }
            for name, (target, component) in split.items()
        },
        "measure": measure,
    }
    read = config.sections_from_config(values, list(values))
    return read | {"measured": read.pop("measure")}


def make_fleet(
    root: Path,
    engines: dict[str, str] | None = None,
    measure: tuple[str, ...] = ("cpu",),
    *,
    source: str = "synthetic",
    rel_l2: float = 1e-5,
    gpus: tuple[str, ...] = (),
    batch: Any = 2,
    quantized: dict[str, str] | None = None,
    scores: dict[str, Scores] = NOT_SCORED,
    errors: tuple[float, ...] = (0.02, 0.03, 0.05, 0.02, 0.03, 0.04),
    baselines: dict[str, config.Baseline] | None = None,
) -> Made:
    """Write the artifacts of a fleet of two targets, one of them measured, below ``root``."""
    workspace = Workspace(root)
    engines = engines or {"cpu-text_encoder": "fp32", "cpu-unet": "fp32", "rtx-unet": "fp16"}
    arguments = sections(engines, list(measure), source, quantized or {})
    write_reference(workspace)
    for engine in arguments["engines"].values():
        write_engine(workspace, engine, batch)
    for name, graph in arguments["graphs"].items():
        if graph.source is None:
            write_operators(workspace, name, None if isinstance(batch, dict) else 1_000_000)
            write_check(workspace, name, unchecked=graph.precision == "bf16")
        else:
            write_costs(workspace, name, graph.source, errors)
    for target in measure:
        components = {
            e.component: e.precision for e in arguments["engines"].values() if e.target == target
        }
        write_parity(workspace, target, components, rel_l2, scores)
        write_latencies(
            workspace, target, components, list(gpus), baselines or {"pytorch": PYTORCH}
        )
    folder = root / "out"
    folder.mkdir(exist_ok=True)
    return Made(workspace, folder, arguments)
