"""Validate the engines of a target on a recorded reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffusion_engines import layout
from diffusion_engines.config import Validate
from diffusion_engines.errors import ConfigError
from diffusion_engines.files import read_manifest, write_json, write_table
from diffusion_engines.parity.gates import gate_of, misses_of_component, misses_of_images
from diffusion_engines.parity.metrics import Difference, psnr, ssim, worst_difference
from diffusion_engines.progress import progress, step
from diffusion_engines.runtime.assemble import target_networks
from diffusion_engines.runtime.conditioning import Network, outputs_of
from diffusion_engines.runtime.recording import (
    load_settings,
    prompt_batches,
    recorded_calls,
    save_images,
)
from diffusion_engines.runtime.sampling import load_model, sample

# From the precision that costs least: an image is judged by the lowest of its components.
_PRECISIONS = ("fp32", "fp16-mixed", "fp16", "bf16", "int8", "fp8")


def validate_target(
    target: str,
    components: Mapping[str, str],
    tolerances: Validate,
    folder: Path,
    metrics: Path,
    plot: Path,
    *,
    device: str,
) -> list[str]:
    """Compare every component on recorded inputs, then the images; return what is out of tolerance.

    Writes ``steps.csv`` (the difference of every call), ``validation.json`` and images into
    ``folder``, and the worst value of each component into ``metrics``, whatever the outcome.

    Args:
        target: whose bundles.
        components: those that have an engine, with their precisions.
        tolerances: by component and precision.
        folder: gets the details.
        metrics: gets the summary.
        plot: gets the errors along the trajectory as a table.
        device: where the engines take their inputs.

    Raises:
        ConfigError: there is no tolerance for a component in its precision.
    """
    gates = {name: gate_of(tolerances, name, p) for name, p in components.items()}
    lowest = max(components.values(), key=_PRECISIONS.index)
    if lowest not in tolerances.images:
        raise ConfigError(f"validate.images.{lowest} has no tolerance (conf/validate/)")
    image_gate = tolerances.images[lowest]
    with step("check the files of the reference"):
        read_manifest(layout.REFERENCE, "reference")
    networks = target_networks(target, components, device)

    misses: list[str] = []
    summary: dict[str, Any] = {}
    details: dict[str, Any] = {"components": {}, "gates": {}}
    rows: list[dict[str, Any]] = []
    for name, precision in components.items():
        with step(f"compare {name} with the reference"):
            found = component_differences(name, networks[name], device)
        misses += misses_of_component(f"{name} ({precision})", gates[name], found)
        worst = worst_of(found)
        summary[f"{name}_rel_l2"] = worst["rel_l2"]
        summary["not_finite"] = summary.get("not_finite", 0) + worst["not_finite"]
        details["components"][name] = {"precision": precision, **worst}
        details["gates"][name] = asdict(gates[name])
        rows += [{"component": name, "call": i, **asdict(value)} for i, value in enumerate(found)]
    with step("compare the images with the reference"):
        images = compare_images(networks, folder, device)
    misses += misses_of_images(image_gate, images)
    for metric in ("psnr", "ssim"):
        summary[metric] = min(image[metric] for image in images)
    details |= {"images": images, "image_gate": asdict(image_gate), "misses": misses}

    write_table(folder / "steps.csv", rows)
    # The UNet is the one component with a trajectory to plot.
    write_table(plot, [row for row in rows if row["component"] == "unet"] or rows)
    write_json(folder / "validation.json", details)
    write_json(metrics, summary)
    return misses


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


def compare_images(
    networks: Mapping[str, Network], folder: Path, device: str
) -> list[dict[str, float]]:
    """Sample the reference's prompts from its noise into ``folder``; compare image by image."""
    settings, prompts, seed, batch_size = load_settings(layout.REFERENCE)
    noise = load_file(layout.REFERENCE / "latents.safetensors")
    expected = load_file(layout.REFERENCE / "images.safetensors")["images"]
    model = load_model(layout.WEIGHTS)
    made = []
    for index, (batch, seeds) in enumerate(prompt_batches(prompts, seed, batch_size)):
        latents = noise[f"{index}.noise"]
        result = sample(networks, model, settings, batch, latents, seeds=seeds, device=device)
        made.append(result.images.float())
    images = torch.cat(made)[: len(prompts)]
    save_images(images, folder, "image")
    return [
        {"psnr": psnr(a[None], b[None]), "ssim": ssim(a[None], b[None])}
        for a, b in zip(images, expected, strict=True)
    ]
