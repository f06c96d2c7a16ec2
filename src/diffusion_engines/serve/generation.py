"""Images from prompts by the engines of a target; each says what it was made with."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_engines import __version__, manifests
from diffusion_engines.bench.breakdown import phase_milliseconds
from diffusion_engines.config import Generate
from diffusion_engines.config import Image as ImageSettings
from diffusion_engines.errors import ConfigError
from diffusion_engines.families import role_of
from diffusion_engines.families.base import Model, Network
from diffusion_engines.families.parts import guided_rows
from diffusion_engines.files import MANIFEST, sha256_of_file, write_json
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import Machine
from diffusion_engines.progress import step
from diffusion_engines.report.images import write_trajectory
from diffusion_engines.runtime.assemble import target_networks
from diffusion_engines.runtime.calls import spread
from diffusion_engines.runtime.recording import picture, prompt_batches, save_images
from diffusion_engines.runtime.sampling import (
    Sample,
    Settings,
    initial_latents,
    load_model,
    sample,
)
from diffusion_engines.runtime.shapes import CheckedEngine, Sizes, wider

# The key under which a PNG carries its settings, as JSON.
SETTINGS_KEY = "diffusion-engines"


def generate_images(
    target: str,
    components: Mapping[str, str],
    generate: Generate,
    image: ImageSettings,
    folder: Path,
    *,
    workspace: Workspace,
    device: str,
    machine: Machine,
) -> None:
    """Write the images of all prompts, an animation of each, and the durations into ``folder``.

    ``image-NN.png`` carries its settings and the hashes of the engines as text; ``image-NN.gif``
    shows how it came about; ``durations.json`` has every batch and, for the denoiser, every step.
    Components without an engine run in PyTorch.

    Args:
        target: whose bundles.
        components: those that have an engine, with their precisions.
        generate: prompts and settings.
        image: the size where ``generate`` has none, and the images of one call.
        folder: empty.
        workspace: that holds bundles, and weights for components without an engine.
        device: where the engines take their inputs.
        machine: that this is, for the durations.

    Raises:
        ConfigError: the engines were not built for this size.
        IntegrityError, FingerprintError, HardwareError: as of ``load_bundle``.
    """
    packed = manifests.read(workspace.pipeline(target), manifests.Pipeline)
    model = load_model(workspace.pipeline(target))
    networks = target_networks(target, components, device, workspace=workspace)
    settings = Settings(
        scheduler=generate.scheduler,
        steps=generate.steps,
        guidance_scale=generate.guidance_scale,
        height=generate.height or image.height,
        width=generate.width or image.width,
        vae_scale_factor=image.vae_scale_factor,
        negative_prompt=generate.negative_prompt,
        guidance=image.guidance,
    )
    check_size(networks, settings)
    prompts = [prompt for prompt in generate.prompts for _ in range(generate.images_per_prompt)]
    engines = {
        name: _origin(workspace.bundle(target, name), networks[name]) for name in sorted(networks)
    }
    common = {
        **asdict(settings),
        "model": packed.model,
        "synthetic": packed.synthetic,
        "loras": asdict(packed)["loras"],
        "engines": engines,
    }
    batch_size = images_per_call(networks, image, len(prompts))
    batches = []
    for index, (batch, seeds) in enumerate(prompt_batches(prompts, generate.seed, batch_size)):
        first = index * batch_size
        count = min(batch_size, len(prompts) - first)  # the last batch is filled up
        noise = initial_latents(model, settings, seeds)
        label = f"{first + 1} to {first + count}" if count > 1 else f"{first + 1}"
        with step(f"image {label} of {len(prompts)}, {settings.steps} steps"):
            result = sample(
                networks,
                model,
                settings,
                batch,
                noise,
                seeds=seeds,
                device=device,
                description=batch[0][:40],
                trajectory=generate.frames > 0,
            )
        for row in range(count):
            details = {"prompt": batch[row], "seed": seeds[row], **common}
            path = folder / f"image-{first + row:02d}.png"
            picture(result.images[row]).save(path, pnginfo=_text_chunks(details))
        if generate.frames:
            with step(f"animation of image {label}"):
                _animate(networks, model, result, generate.frames, folder, first, count, device)
        batches.append(_durations(result, first, count))
    write_json(
        folder / "durations.json",
        {**common, "machine": machine, "seed": generate.seed, "prompts": prompts}
        | {"batches": batches},
    )
    _print_durations(batches)


def check_size(networks: Mapping[str, Network], settings: Settings) -> None:
    """Compare the size of the images with what each engine takes, before anything runs.

    Raises:
        ConfigError: names the engine and the sizes that it takes, in pixels.
    """
    for network in networks.values():
        for name in ("height", "width"):
            if (sizes := _axis(network, name)) is None:
                continue
            pixels = sizes.scaled(settings.vae_scale_factor)
            if (size := getattr(settings, name)) not in pixels:
                raise ConfigError(
                    f"generate.{name}: the engine {_name(network)} was not built for {size} pixels",
                    expected=f"{pixels} pixels",
                    found=f"{size} pixels",
                    fix=f"choose such a {name};\n{wider([sizes])}",
                )


def images_per_call(networks: Mapping[str, Network], image: ImageSettings, wanted: int) -> int:
    """Return how many images one call makes: what all engines take, and no more than wanted."""
    low, high = 1, wanted
    for name, network in networks.items():
        if (sizes := _axis(network, "batch")) is not None:
            rows = guided_rows(image) if role_of(name) == "denoiser" else 1
            low, high = max(low, sizes.low // rows), min(high, sizes.high // rows)
    if all(not isinstance(network, CheckedEngine) for network in networks.values()):
        high = min(high, image.batch_size)  # nothing but memory limits PyTorch
    return max(low, high)


def _axis(network: Network, name: str) -> Sizes | None:
    """The sizes of a dimension of an engine's first input; None where it has no such dimension."""
    if not isinstance(network, CheckedEngine):
        return None
    return next((axis for axis in network.inputs[0].axes if axis.name == name), None)


def _name(network: Network) -> str:
    return network.name if isinstance(network, CheckedEngine) else "PyTorch"


def _origin(bundle: Path, network: Network) -> dict[str, Any]:
    """What identifies the network that ran: for an engine, down to its bytes."""
    if not isinstance(network, CheckedEngine):
        return {"backend": "PyTorch", "precision": "fp32"}
    manifest = network.manifest
    return {
        "name": network.name,
        "builder": manifest.builder,
        "precision": manifest.precision,
        "fingerprint": manifest.fingerprint,
        "manifest_sha256": sha256_of_file(bundle / MANIFEST),
    }


def _text_chunks(details: Mapping[str, Any]) -> PngInfo:
    """Prompt and software under PNG's own keywords, everything as JSON under SETTINGS_KEY."""
    chunks = PngInfo()
    chunks.add_itxt("Description", details["prompt"])
    chunks.add_text("Software", f"diffusion-engines {__version__}")
    chunks.add_itxt(SETTINGS_KEY, json.dumps(details, sort_keys=True, ensure_ascii=False))
    return chunks


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that a PNG carries: prompt, seed, scheduler, engines and so on.

    Raises:
        ConfigError: it carries none, because something else wrote it or stripped its text.
    """
    with Image.open(path) as image:
        text = image.info.get(SETTINGS_KEY)
    if text is None:
        raise ConfigError(f"{path} carries no settings", expected=f"a text chunk {SETTINGS_KEY}")
    return json.loads(text)


def _animate(
    networks: Mapping[str, Network],
    model: Model,
    result: Sample,
    frames: int,
    folder: Path,
    first: int,
    count: int,
    device: str,
) -> None:
    steps = spread(range(len(result.latents)), frames)
    decoded = [
        model.family.decode(networks, model, result.latents[i].to(device)).cpu() for i in steps
    ]
    for row in range(count):
        with tempfile.TemporaryDirectory() as scratch:
            save_images(torch.stack([images[row] for images in decoded]), Path(scratch), "frame")
            paths = sorted(Path(scratch).iterdir())
            write_trajectory(folder / f"image-{first + row:02d}.gif", paths, steps)


def _durations(result: Sample, first: int, count: int) -> dict[str, Any]:
    phases = phase_milliseconds(result.durations)
    return {
        "images": list(range(first, first + count)),
        "milliseconds": {name: round(value, 3) for name, value in phases.items()},
        "denoiser_per_step": [round(seconds * 1e3, 3) for seconds in result.durations.denoiser],
    }


def _print_durations(batches: Sequence[Mapping[str, Any]]) -> None:
    """Print the medians over the batches; the first call of an engine is slower than the rest."""
    phases = batches[0]["milliseconds"]
    for phase in phases:
        median = statistics.median(batch["milliseconds"][phase] for batch in batches)
        print(f"  {phase.replace('_', ' '):<24} {median:9.1f} ms")
    calls = [value for batch in batches for value in batch["denoiser_per_step"]]
    print(f"  {'denoiser, one step':<24} {statistics.median(calls):9.1f} ms")
