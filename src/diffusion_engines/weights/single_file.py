"""Fill a diffusers model folder from a checkpoint in one file, as model-sharing sites have them.

Such a file has all networks under the names of the first Stable Diffusion code, and says nothing of
architecture, tokenizer and noise schedule: those are of the diffusers folder that it is read with.
diffusers does the renaming (``from_single_file``).
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffusion_engines.errors import WeightsError
from diffusion_engines.families import family_of
from diffusion_engines.weights.sources import copy_from_folder, save_network

# What every such file has, however many text encoders and other VAEs it was shared without.
_DENOISER = "model.diffusion_model."
# As safetensors names them.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fill_from_file(checkpoint: Path, architecture: Path, destination: Path) -> None:
    """Write the networks of a single-file checkpoint as a diffusers folder.

    They keep the dtype of the file; where it has several, they become fp32, which loses nothing.

    Args:
        checkpoint: safetensors.
        architecture: a diffusers folder with the JSONs and tokenizers of the model.
        destination: gets a diffusers folder.

    Raises:
        WeightsError: it is no such file, or lacks a network, or is of another architecture.
    """
    for library in ("diffusers", "transformers"):  # their bars, and advice for other purposes
        logging = importlib.import_module(f"{library}.utils.logging")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    dtypes = _dtypes_of(checkpoint)
    copy_from_folder(architecture, destination)
    family = family_of(destination)
    try:
        pipeline = getattr(diffusers, family.class_name).from_single_file(
            str(checkpoint),
            config=str(destination),
            local_files_only=True,
            dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
            **family.options({}),
        )
    except (SingleFileComponentError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _other_architecture(checkpoint, architecture, str(error)) from error
    for component in family.components.values():
        network = getattr(pipeline, component.folder)
        # diffusers loads what it finds, and leaves the rest without values.
        if missing := sorted(name for name, value in network.state_dict().items() if value.is_meta):
            raise _other_architecture(
                checkpoint,
                architecture,
                f"no {component.folder}.{missing[0]}, and {len(missing)} are missing in all",
            )
        folder = destination / component.folder
        save_network(network, folder)


def _dtypes_of(path: Path) -> set[torch.dtype]:
    if not path.is_file():
        raise WeightsError(
            "there is no such checkpoint",
            expected="model.checkpoint: a .safetensors file with all networks of a model",
            found=str(path),
            fix="give its path: model.source=file model.checkpoint=/path/model.safetensors",
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            dtypes = {tensors.get_slice(name).get_dtype() for name in names}
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file",
            found=f"{path.stat().st_size} bytes; {error}",
            fix="a .ckpt is a pickle, which can run code when it is loaded, and is not read here:\n"
            "take the .safetensors of the same model; one that is cut short, get again",
        ) from error
    if not any(name.startswith(_DENOISER) for name in names):
        raise WeightsError(
            f"{path} is no checkpoint of a whole model",
            expected=f"tensors named {_DENOISER}…",
            found=", ".join(names[:3]) or "no tensors",
            fix="a LoRA belongs into model.loras (docs/loras.md); a VAE or a UNet alone cannot be\n"
            "taken; of a diffusers folder: model.source=local model.folder=…",
        )
    return {_DTYPES[name] for name in dtypes if name in _DTYPES}  # and int64, of position ids


def _other_architecture(checkpoint: Path, architecture: Path, found: str) -> WeightsError:
    return WeightsError(
        f"{checkpoint} is not of the architecture of {architecture}",
        expected="the networks that its config.json describe, all of them",
        found=" ".join(found.split())[:300],
        fix="choose the model that it was made from (model=sd14, sd21, sdxl, …), which names the\n"
        "architecture; a file without text encoder or VAE: convert it with diffusers",
    )
