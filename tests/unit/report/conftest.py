"""Artifacts of a fleet of two targets, one of them measured, as small as they can be."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from diffusion_engines import config

STEPS = 3
PROMPTS = ["lemons & <script>alert(1)</script>", "cherries"]
CALLS = {"text_encoder": 4, "unet": 2 * STEPS, "vae_decoder": 2}
GATE = {"rel_l2": 1e-4, "max_abs": 1e-3, "cosine": 0.99999}


def write(path: str | Path, value: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value))


def picture(path: str, shade: int) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 8), (shade, 40, 90)).save(path)


def write_reference() -> None:
    write(
        "artifacts/reference/settings.json",
        {
            "sampling": {"scheduler": "lms", "steps": STEPS, "guidance_scale": 7.5},
            "prompts": PROMPTS,
            "seed": 42,
            "batch_size": 1,
            "frame_steps": [0, 1, 3],
        },
    )
    for index in range(3):
        picture(f"artifacts/reference/frame-{index:02d}.png", 100)  # equal, on purpose
    for index in range(2):
        picture(f"artifacts/reference/image-{index:02d}.png", 100)


def write_engine(target: str, component: str, precision: str, batch: Any = 2) -> None:
    inputs = [{"name": "input_0", "role": "latents", "dtype": "component", "shape": [batch, 4, 8]}]
    write(
        f"artifacts/engines/{target}/{component}/manifest.json",
        {
            "kind": "engine",
            "name": f"{target}-{component}",
            "builder": "onnxruntime 1.32.0",
            "dtypes": {precision: 7},
            "files": {
                "engine.onnx": {"bytes": 1000, "sha256": "a" * 64},
                "engine.onnx.data": {"bytes": 2500, "sha256": "b" * 64},
            },
            "fingerprint": {"compute_capabilities": ["12.0", "8.9"]},
            "inputs": inputs,
            "layers": {"Conv": 3},
            "settings": {"backend": "onnxruntime", "build": {"optimization_level": "all"}},
            "synthetic": True,
            "loras": [],
            "onnx": {
                "name": f"{component}-{precision}",
                "exporter": "dynamo",
                "opset": 18,
                "patches": [],
                "inputs": inputs,
                "versions": {"torch": "2.13.0"},
                "simplify_rel_l2": 0.0,
            },
        },
    )
    steps = [("check the files", 1.0, 10), ("build it", 2.5, 4_000_000_000)]
    write(
        f"artifacts/logs/build/{target}-{component}/resources.json",
        [{"step": s, "seconds": t, "peak_memory_bytes": m} for s, t, m in steps],
    )


def write_operators(name: str, macs: int | None) -> None:
    before = {"operators": {"Conv": 3, "Add": 9}, "nodes": 12, "bytes": 5000, "macs": macs}
    after = {"operators": {"Conv": 3, "Add": 4}, "nodes": 7, "bytes": 4000, "macs": macs}
    write(f"artifacts/operators/{name}/operators.json", {"before": before, "after": after})


def write_quantization(name: str, source: str, calls: list[float]) -> None:
    """The costs of a quantized graph; its source is a hundred times as exact."""
    write(
        f"artifacts/quantization/{name}/quantization.json",
        {
            "source": source,
            "calls": 16,
            "allowed": 0.1,
            "bytes": 7000,
            "lowered": {"Conv": 40, "MatMul": 60},
            "kept": {"Conv": 2},
        },
    )
    with Path(f"artifacts/quantization/{name}/steps.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["call", "source_rel_l2", "rel_l2", "max_abs", "cosine", "not_finite"])
        rows.writerows([i, v / 100, v, 1.0, 1.0, 0] for i, v in enumerate(calls))


def write_validation(
    target: str, components: dict[str, str], rel_l2: float, scores: dict[str, Any]
) -> None:
    broken = int(rel_l2 == float("inf"))
    worst = {"rel_l2": rel_l2, "max_abs": 1e-4, "cosine": 0.999999, "not_finite": broken}
    write(
        f"artifacts/validation/{target}/validation.json",
        {
            "components": {n: {"precision": p, **worst} for n, p in components.items()},
            "gates": dict.fromkeys(components, GATE),
            "image_gate": {"psnr": 60.0, "ssim": 0.999},
            "images": [{"psnr": 100.0, "ssim": 1.0}, {"psnr": 61.5, "ssim": 0.9995}],
            "latents": worst,
            "latents_gate": {"rel_l2": 2e-3, "cosine": 0.9999},
            "scores": scores,
            "misses": [],
        },
    )
    with Path(f"artifacts/validation/{target}/trajectory.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "step", "rel_l2", "max_abs", "cosine", "not_finite"])
        for image in range(2):
            rows.writerows([image, s + 1, rel_l2, 1e-4, 0.999999, broken] for s in range(STEPS))
    with Path(f"artifacts/validation/{target}/steps.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["component", "call", "rel_l2", "max_abs", "cosine", "not_finite"])
        for name in components:
            rows.writerows(
                [name, call, rel_l2, 1e-4, 0.999999, broken] for call in range(CALLS[name])
            )
    for index in range(2):
        picture(f"artifacts/validation/{target}/image-{index:02d}.png", 100 + 3 * index)


def write_generated(target: str, count: int, *, animated: bool) -> None:
    settings = {"scheduler": "euler", "steps": 9, "guidance_scale": 5.0, "height": 8, "width": 16}
    prompts = [f"fruit number {index}" for index in range(count)]
    write(f"artifacts/images/{target}/timings.json", settings | {"prompts": prompts, "seed": 7})
    for index in range(count):
        picture(f"artifacts/images/{target}/image-{index:02d}.png", 20 * index)
        if animated:
            picture(f"artifacts/images/{target}/image-{index:02d}.gif", 20 * index)


def write_benchmark(target: str, components: dict[str, str], gpus: list[str]) -> None:
    # Parts of a run, as they add up; a UNet call is half of the total in both.
    shares = {
        "encoding": 0.1,
        "denoising_loop": 0.8,
        "denoiser": 0.7,
        "scheduler_and_guidance": 0.1,
        "decoding": 0.1,
        "total": 1.0,
        "denoiser_call": 0.5,
    }
    latency = {
        runner: {
            phase: {f"{name}_ms": share * total for name in ("mean", "median", "p90", "p99")}
            for phase, share in shares.items()
        }
        for runner, total in (("pytorch", 60.0), ("engines", 24.0))
    }
    write(
        f"artifacts/benchmark/{target}/benchmark.json",
        {
            "runners": [["pytorch", "PyTorch eager, fp32"], ["engines", f"engines, {target}"]],
            "components": components,
            "latency": latency,
            "memory": {r: {"resident": 2_000_000_000, "gpu": 0} for r in latency},
            "images_per_second": {"pytorch": 33.3, "engines": 83.3},
            "machine": {"cpu": "Testor 9000", "cores": 4, "memory_gib": 16, "gpus": gpus},
            "settings": {
                "repeats": 5,
                "warmup": 1,
                "steps": STEPS,
                "scheduler": "lms",
                "guidance_scale": 7.5,
            },
        },
    )


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
        "repo": "someone/toy",
        "revision": "0123456789abcdef",
        "seed": 0,
        "dtype": "fp32",
        "parameters": {"unet": 1_500_000},
        "lora_folder": "loras",
        "loras": [],
    }
    values = {
        "model": model,
        "image": {"height": 64, "width": 64, "batch_size": 1, "vae_scale_factor": 8},
        "exports": {
            f"{component}-{engines[name]}": {
                "component": component,
                "weights": "vae" if component == "vae_decoder" else component,
                "precision": engines[name],
            }
            for name, (_, component) in split.items()
            if f"{component}-{engines[name]}" not in quantized
        },
        "quantized": {
            name: {"component": name.split("-")[0], "precision": name.split("-")[1], "source": made}
            for name, made in quantized.items()
        },
        "engines": {
            name: {
                "target": target,
                "backend": "onnxruntime",
                "component": component,
                "precision": engines[name],
            }
            for name, (target, component) in split.items()
        },
        "measure": {target: {} for target in measure},
    }
    return config.sections_from_config(values, list(values))


NOT_SCORED = {
    name: {"images": None, "reference": None, "missing": f"models/scorers/{name} is not there"}
    for name in ("lpips", "clip")
}


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Make artifacts and return the arguments of ``write_report`` and an empty folder for it."""
    monkeypatch.chdir(tmp_path)

    def make(
        engines: dict[str, str] | None = None,
        measure: tuple[str, ...] = ("cpu",),
        *,
        source: str = "synthetic",
        rel_l2: float = 1e-5,
        gpus: tuple[str, ...] = (),
        batch: Any = 2,
        quantized: dict[str, str] | None = None,
        scores: dict[str, Any] = NOT_SCORED,
        errors: tuple[float, ...] = (0.02, 0.03, 0.05, 0.02, 0.03, 0.04),
    ) -> SimpleNamespace:
        engines = engines or {"cpu-text_encoder": "fp32", "cpu-unet": "fp32", "rtx-unet": "fp16"}
        arguments = sections(engines, list(measure), source, quantized or {})
        write_reference()
        for engine in arguments["engines"].values():
            write_engine(engine.target, engine.component, engine.precision, batch)
        for export in arguments["exports"]:
            write_operators(export, None if isinstance(batch, dict) else 1_000_000)
        for name, item in arguments["quantized"].items():
            write_quantization(name, item.onnx, list(errors))
        for target in measure:
            components = {
                e.component: e.precision
                for e in arguments["engines"].values()
                if e.target == target
            }
            write_validation(target, components, rel_l2, scores)
            write_benchmark(target, components, list(gpus))
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        return SimpleNamespace(folder=folder, arguments=arguments)

    return make
