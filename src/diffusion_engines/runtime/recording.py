"""Record what goes into and comes out of every network along real denoising trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from diffusion_engines.families.base import Model, Network
from diffusion_engines.files import read_json, write_json
from diffusion_engines.runtime.calls import Recorder, spread
from diffusion_engines.runtime.sampling import Settings, initial_latents, sample

_SETTINGS = "settings.json"


def prompt_batches(
    prompts: list[str], seed: int, batch_size: int
) -> list[tuple[list[str], list[int]]]:
    """Split prompts into full batches with a seed each; the last one repeats its last prompt."""
    batches = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        batch += [batch[-1]] * (batch_size - len(batch))
        batches.append((batch, [seed + start + i for i in range(batch_size)]))
    return batches


def record_reference(
    networks: Mapping[str, Network],
    model: Model,
    settings: Settings,
    prompts: list[str],
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    frames: int,
) -> None:
    """Sample every prompt and write into ``folder`` all that engines are compared with.

    ``<component>.safetensors`` hold the calls, ``latents.safetensors`` the initial noise and the
    trajectory of each batch, ``images.safetensors`` the images in fp32, ``image-N.png`` and
    ``frame-NN.png`` what a person looks at.
    """
    recorders = {name: Recorder(network) for name, network in networks.items()}
    latents, images = {}, []
    first: list[torch.Tensor] = []
    for index, (batch, seeds) in enumerate(prompt_batches(prompts, seed, batch_size)):
        noise = initial_latents(model, settings, seeds)
        result = sample(
            recorders, model, settings, batch, noise, seeds=seeds, description=batch[0][:40]
        )
        latents[f"{index}.noise"] = noise
        latents[f"{index}.trajectory"] = torch.stack(result.latents)
        images.append(result.images)
        first = first or [latent[:1] for latent in result.latents]
    for name, recorder in recorders.items():
        recorder.save(folder / f"{name}.safetensors")
    save_file(latents, folder / "latents.safetensors")
    all_images = torch.cat(images)[: len(prompts)].contiguous()
    save_file({"images": all_images}, folder / "images.safetensors")
    save_images(all_images, folder, "image")
    chosen = spread(range(len(first)), frames)
    # The batch that a network takes is fixed, so a frame fills it.
    decoded = [
        model.family.decode(networks, model, first[i].expand(batch_size, -1, -1, -1))[:1]
        for i in chosen
    ]
    save_images(torch.cat(decoded), folder, "frame")
    write_settings(folder, settings, prompts, seed=seed, batch_size=batch_size, frame_steps=chosen)


def write_settings(
    folder: Path,
    settings: Settings,
    prompts: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    frame_steps: Sequence[int],
) -> None:
    """Write how a reference came about; ``frame_steps`` are those that it has pictures of."""
    write_json(
        folder / _SETTINGS,
        {
            "sampling": vars(settings),
            "prompts": prompts,
            "seed": seed,
            "batch_size": batch_size,
            "frame_steps": frame_steps,
        },
    )


def load_settings(folder: Path) -> tuple[Settings, list[str], int, int]:
    """Return settings, prompts, seed and batch size of a recorded reference."""
    recorded = read_json(folder / _SETTINGS)
    return (
        Settings(**recorded["sampling"]),
        recorded["prompts"],
        recorded["seed"],
        recorded["batch_size"],
    )


def save_images(images: torch.Tensor, folder: Path, stem: str) -> None:
    """Write images (batch, 3, h, w) in [0, 1] as ``<stem>-00.png`` …; NaN becomes magenta."""
    for index, image in enumerate(images):
        picture(image).save(folder / f"{stem}-{index:02d}.png")


def picture(image: torch.Tensor) -> Image.Image:
    """Return an image (3, h, w) in [0, 1] as 8-bit RGB; pixels with NaN become magenta."""
    broken = ~torch.isfinite(image).all(dim=0)
    pixels = (image.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.permute(1, 2, 0).contiguous()
    pixels[broken] = torch.tensor([255, 0, 255], dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
