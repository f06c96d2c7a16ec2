"""Validate the engines of a target on a recorded reference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffusion_engines import layout
from diffusion_engines.config import Validate
from diffusion_engines.families import role_of
from diffusion_engines.families.base import Network, outputs_of
from diffusion_engines.files import read_manifest, write_json, write_table
from diffusion_engines.layout import Workspace
from diffusion_engines.parity import scorers
from diffusion_engines.parity.gates import (
    gate_of,
    misses_of_component,
    misses_of_images,
    misses_of_latents,
    run_gates_of,
)
from diffusion_engines.parity.metrics import Difference, worst_difference
from diffusion_engines.parity.pipeline import (
    Run,
    image_differences,
    latent_differences,
    reference_run,
    run_from_noise,
)
from diffusion_engines.parity.scorers import Scores
from diffusion_engines.progress import progress, step
from diffusion_engines.runtime.assemble import target_networks
from diffusion_engines.runtime.recording import recorded_calls, save_images

# From the precision that costs least: an image is judged by the lowest of its components.
_PRECISIONS = ("fp32", "fp16-mixed", "fp16", "bf16", "int8", "fp8")


def validate_target(
    target: str,
    components: Mapping[str, str],
    tolerances: Validate,
    folder: Path,
    metrics: Path,
    plots: Path,
    *,
    device: str,
) -> list[str]:
    """Compare every component on recorded inputs, then whole runs; return what is out of tolerance.

    Writes ``steps.csv`` (the difference of every call), ``trajectory.csv`` (of the latents after
    every step of the whole pipeline), ``validation.json`` and images into ``folder``, and the worst
    values into ``metrics``, whatever the outcome.

    Args:
        target: whose bundles.
        components: those that have an engine, with their precisions.
        tolerances: by component and precision, and the folder of the scorers.
        folder: gets the details.
        metrics: gets the summary.
        plots: a folder that gets the errors along the trajectories as tables.
        device: where the engines take their inputs.

    Raises:
        ConfigError: there is no tolerance for a component in its precision.
        IntegrityError: a file of the reference, an engine or a scorer is damaged.
    """
    gates = {name: gate_of(tolerances, name, p) for name, p in components.items()}
    lowest = max(components.values(), key=_PRECISIONS.index)
    latents_gate, image_gate = run_gates_of(tolerances, lowest)
    with step("check the files of the reference"):
        read_manifest(layout.REFERENCE, "reference")
    networks = target_networks(Workspace(), target, components, device)

    misses: list[str] = []
    summary: dict[str, Any] = {}
    details: dict[str, Any] = {"components": {}, "gates": {}}
    calls: list[dict[str, Any]] = []
    for name, precision in components.items():
        with step(f"compare {name} with the reference"):
            found = component_differences(name, networks[name], device)
        misses += misses_of_component(f"{name} ({precision})", gates[name], found)
        worst = worst_of(found)
        summary[f"{name}_rel_l2"] = worst["rel_l2"]
        summary["not_finite"] = summary.get("not_finite", 0) + worst["not_finite"]
        details["components"][name] = {"precision": precision, **worst}
        details["gates"][name] = asdict(gates[name])
        calls += [{"component": name, "call": i, **asdict(value)} for i, value in enumerate(found)]

    with step("run the whole pipeline from the reference's noise"):
        reference, run = reference_run(), run_from_noise(networks, device)
        save_images(run.images, folder, "image")
    latents = latent_differences(run, reference)
    misses += misses_of_latents(latents_gate, latents)
    worst = worst_of([value for image in latents for value in image])
    summary |= {"latents_rel_l2": worst["rel_l2"], "latents_cosine": worst["cosine"]}
    details |= {"latents": worst, "latents_gate": asdict(latents_gate)}
    trajectory = [
        {"image": index, "step": number, **asdict(value)}
        for index, image in enumerate(latents)
        for number, value in enumerate(image, 1)
    ]

    images = image_differences(run, reference)
    misses += misses_of_images(image_gate, images)
    summary |= {metric: min(image[metric] for image in images) for metric in ("psnr", "ssim")}
    details |= {"images": images, "image_gate": asdict(image_gate), "misses": misses}
    scores = _scores(run, reference, Path(tolerances.scorers))
    details["scores"] = {name: asdict(found) for name, found in scores.items()}
    lpips, clip = scores["lpips"], scores["clip"]
    summary["lpips"] = max(lpips.images) if lpips.images else None
    summary["clip"] = statistics.mean(clip.images) if clip.images else None
    summary["clip_reference"] = statistics.mean(clip.reference) if clip.reference else None

    write_table(folder / "steps.csv", calls)
    write_table(folder / "trajectory.csv", trajectory)
    # The denoiser is the one component with a trajectory to plot.
    steps = [row for row in calls if role_of(row["component"]) == "denoiser"]
    write_table(plots / "denoiser.csv", steps or calls)
    write_table(plots / "latents.csv", trajectory)
    write_json(folder / "validation.json", details)
    write_json(metrics, summary)
    return misses


def _scores(run: Run, reference: Run, folder: Path) -> dict[str, Scores]:
    found = {}
    for name, scorer in (("lpips", scorers.lpips), ("clip", scorers.clip_score)):
        with step(f"score the images, {name}"):
            found[name] = scorer(run, reference, folder)
        if found[name].missing:
            print(f"  {name}: not measured, {found[name].missing}")
    return found


def component_differences(name: str, network: Network, device: str) -> list[Difference]:
    """Compare a component with each of its recorded calls."""
    calls = recorded_calls(layout.REFERENCE / f"{name}.safetensors")
    found = []
    for inputs, expected in progress(calls, name):
        with torch.no_grad():
            outputs = outputs_of(network(*(tensor.to(device) for tensor in inputs)))
        found.append(worst_difference([value.float().cpu() for value in outputs], expected))
    return found


def worst_of(found: Sequence[Difference]) -> dict[str, float]:
    """Return the worst value of each distance."""
    return {
        "rel_l2": max(value.rel_l2 for value in found),
        "max_abs": max(value.max_abs for value in found),
        "cosine": min(value.cosine for value in found),
        "not_finite": sum(value.not_finite for value in found),
    }
