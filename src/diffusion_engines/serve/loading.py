"""Load engines as PyTorch modules, or all of a target as a diffusers pipeline.

Heavy libraries are imported inside the functions: ``import diffusion_engines`` stays instant.
"""

from __future__ import annotations

import importlib
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.errors import ConfigError, HardwareError, IntegrityError
from diffusion_engines.files import MANIFEST, read_json, read_manifest
from diffusion_engines.runtime.bundle import engine_device, is_device, load_bundle
from diffusion_engines.serve.pack import PIPELINE

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from diffusion_engines.runtime.shapes import CheckedEngine

# The engines that a diffusers pipeline is made of.
_COMPONENTS = {"StableDiffusionPipeline": ("text_encoder", "unet", "vae_decoder")}
_NETWORKS = ("text_encoder", "unet", "vae")


def load_component(folder: str | PathLike[str], device: str | None = None) -> CheckedEngine:
    """Return one engine as a ``torch.nn.Module``.

    Its inputs and output are those of the component in ``components.py``; inputs are cast to the
    dtypes that the engine takes, and moved where it runs.

    Args:
        folder: a bundle, e.g. ``artifacts/bundles/cpu/unet``.
        device: where to run, ``cpu`` or ``cuda``; None: what the engine was built for. To choose
            among several GPUs, set CUDA_VISIBLE_DEVICES.

    Raises:
        IntegrityError: a file is missing or altered.
        FingerprintError: the engine was built for another machine or library version.
        HardwareError: the engine does not run on ``device``, or the backend's library or GPU is
            missing here.
        ShapeError: of the module, when called with a size that the engine was not built for.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, "bundle", verify=False)  # load_bundle checks the files
    return load_bundle(folder, _device(manifest, device))


def load_pipeline(
    folder: str | PathLike[str], device: str | None = None
) -> StableDiffusionPipeline:
    """Return a diffusers pipeline whose text encoder, UNet and VAE decoder are engines.

    Scheduler and tokenizer are the model's own; a pipeline's usual attributes can be replaced, as
    in ``pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)``. Between the
    networks everything is fp32; each engine casts to the precision that it computes in. Sizes
    default to those that the engines were built around.

    Args:
        folder: all bundles of a target, e.g. ``artifacts/bundles/cpu``; nothing else is read.
        device: as of :func:`load_component`.

    Raises:
        IntegrityError: a file or an engine is missing or altered, or engines of different models
            are mixed.
        ConfigError: the model is of a pipeline that cannot be made of engines yet.
        FingerprintError, HardwareError: as of :func:`load_component`.
        ShapeError: of a call with a size or batch that the engines were not built for.
    """
    from transformers import CLIPTokenizer

    from diffusion_engines.serve.adapters import TextEncoder, UNet, VAEDecoder

    diffusers: Any = importlib.import_module("diffusers")  # untyped
    folder = Path(folder)
    rest = folder / PIPELINE
    packed = read_manifest(rest, "pipeline")
    index = read_json(rest / "model_index.json")
    if (kind := index["_class_name"]) not in _COMPONENTS:
        raise ConfigError(
            f"{folder} is of a model that has another pipeline",
            expected=" or ".join(_COMPONENTS),
            found=kind,
            fix="load its engines with load_component",
        )
    check_complete(folder, _COMPONENTS[kind])
    configs = {name: read_json(rest / name / "config.json") for name in _NETWORKS}
    engines = {}
    for name in _COMPONENTS[kind]:
        engine = load_component(folder / name, device)
        _check_model(folder, engine.manifest, packed)
        engine.pixels_per_latent = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        engines[name] = engine
    scheduler = read_json(rest / "scheduler" / "scheduler_config.json")
    return diffusers.StableDiffusionPipeline(
        vae=VAEDecoder(engines["vae_decoder"], configs["vae"]),
        text_encoder=TextEncoder(engines["text_encoder"], configs["text_encoder"]),
        tokenizer=CLIPTokenizer.from_pretrained(rest / "tokenizer"),
        unet=UNet(engines["unet"], configs["unet"]),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def check_complete(folder: Path, components: tuple[str, ...]) -> None:
    """Raise IntegrityError where a target's folder lacks the engine of a component."""
    missing = [name for name in components if not (folder / name / MANIFEST).is_file()]
    if missing:
        raise IntegrityError(
            f"{folder} has no engine of {', '.join(missing)}",
            expected=f"a bundle of each of {', '.join(components)}",
            found=", ".join(sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))),
            fix="add the engines to the fleet (conf/fleet/) and run `make repro`; or copy the\n"
            "whole folder",
        )


def _device(manifest: dict[str, Any], device: str | None) -> str:
    built_for = engine_device(manifest)
    if device is None:
        return built_for
    if not is_device(device, built_for):
        raise HardwareError(
            f"the engine {manifest['name']} does not run on {device}",
            expected=built_for,
            found=device,
            fix="leave `device` out, or load the engines of another target; to choose among\n"
            "several GPUs, set CUDA_VISIBLE_DEVICES",
        )
    return built_for


def _check_model(folder: Path, manifest: Any, packed: Any) -> None:
    if manifest["model"] != packed["model"]:
        raise IntegrityError(
            f"{folder} mixes engines of different models",
            expected=f"{packed['model']}, as in {PIPELINE}/{MANIFEST}",
            found=f"{manifest['model']}, in {manifest['component']}/{MANIFEST}",
            fix="copy the whole folder again, or run `dvc repro`",
        )
