"""Load engines as PyTorch modules, or all of a target as a diffusers pipeline.

Heavy libraries are imported inside the functions: ``import diffusion_engines`` stays instant.
"""

from __future__ import annotations

import importlib
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.components import STABLE_DIFFUSION_XL, pipeline_of
from diffusion_engines.errors import HardwareError, IntegrityError
from diffusion_engines.files import MANIFEST, read_json, read_manifest
from diffusion_engines.runtime.bundle import engine_device, is_device, load_bundle
from diffusion_engines.serve.pack import PIPELINE

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from diffusion_engines.runtime.shapes import CheckedEngine


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
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Return a diffusers pipeline whose text encoders, UNet and VAE decoder are engines.

    It is of the model's own class. Scheduler and tokenizers are the model's, too; a pipeline's
    usual attributes can be replaced, as in
    ``pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)``. Between the
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
    from diffusion_engines.runtime.conditioning import load_conditioning
    from diffusion_engines.serve.adapters import ADAPTERS

    diffusers: Any = importlib.import_module("diffusers")  # untyped
    folder = Path(folder)
    rest = folder / PIPELINE
    packed = read_manifest(rest, "pipeline")
    pipeline = pipeline_of(rest)
    check_complete(folder, tuple(pipeline.components))
    configs = {
        name: read_json(rest / spec.folder / "config.json")
        for name, spec in pipeline.components.items()
    }
    modules: dict[str, Any] = {}
    for name, spec in pipeline.components.items():
        engine = load_component(folder / name, device)
        _check_model(folder, engine.manifest, packed)
        engine.pixels_per_latent = 2 ** (len(configs["vae_decoder"]["block_out_channels"]) - 1)
        modules[spec.folder] = ADAPTERS[spec.module](engine, configs[name])
    conditioning = load_conditioning(rest)
    for encoder, tokenizer in conditioning.tokenizers.items():
        modules[pipeline.tokenizers[encoder]] = tokenizer
    scheduler = read_json(rest / "scheduler" / "scheduler_config.json")
    modules["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    options: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if pipeline is STABLE_DIFFUSION_XL:
        zeros = conditioning.zeros_for_empty_prompt
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    return getattr(diffusers, pipeline.class_name)(**modules, **options)


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
