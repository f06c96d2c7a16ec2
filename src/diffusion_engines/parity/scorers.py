"""Scores by pretrained networks, where those are installed: LPIPS and CLIP.

``validate.scorers`` names the folder that holds them, and DVC tracks it. Nothing is downloaded: a
scorer that is not there gives no score, and says why.

- ``lpips/checkpoints/alexnet-owt-7be5be79.pth``: torchvision's AlexNet, as ``torch.hub`` keeps it
  below ``lpips``; LPIPS' own layers come with torchmetrics. Needs the extra ``[perceptual]``.
- ``clip/``: a CLIP model in Hugging Face's layout, safetensors.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffusion_engines.errors import HardwareError, IntegrityError
from diffusion_engines.files import sha256_of_file
from diffusion_engines.parity.whole_runs import Run, image_pairs
from diffusion_engines.runtime.recording import picture

# The name ends in the beginning of the file's SHA-256; torchvision has no other AlexNet.
ALEXNET = "alexnet-owt-7be5be79.pth"

_CLIP_FILES = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("tokenizer.json", "vocab.json"),
    ("processor_config.json", "preprocessor_config.json"),
)


@dataclass(frozen=True)
class Scores:
    """What a scorer found: a value per image, or None and the reason.

    Attributes:
        images: of the engines' images; the worst there is where pixels are NaN or infinite.
        reference: of the reference's images, where the score is of one image alone.
        missing: why there are no scores; empty where there are.
    """

    images: tuple[float, ...] | None = None
    reference: tuple[float, ...] | None = None
    missing: str = ""


def lpips(run: Run, reference: Run, folder: Path) -> Scores:
    """Return LPIPS (AlexNet) of each image to that of the reference: 0 is equal, lower is closer.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.

    Raises:
        HardwareError: the weights are there, but not the library that they are for.
        IntegrityError: the weights are damaged.
    """
    weights = folder / "lpips" / "checkpoints" / ALEXNET
    if not weights.is_file():
        return Scores(missing=f"{weights} is not there")
    if importlib.util.find_spec("torchvision") is None:
        raise HardwareError(
            f"{weights} is there for LPIPS, and torchvision is not installed",
            fix="pip install -c constraints.txt -e '.[perceptual]', or remove the file",
        )
    _check_weights(weights)
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    def score(image: torch.Tensor, expected: torch.Tensor) -> float:
        if not torch.isfinite(image).all():
            return math.inf
        return float(
            learned_perceptual_image_patch_similarity(
                image, expected, net_type="alex", normalize=True
            )
        )

    with _torch_hub(folder / "lpips"):
        return Scores(tuple(score(*pair) for pair in image_pairs(run, reference)))


def clip_score(run: Run, reference: Run, folder: Path) -> Scores:
    """Return the CLIP score of each image to its prompt: 100 × their cosine, at least 0.

    Hessel et al., "CLIPScore", 2021, without its factor of 2.5, as torchmetrics has it (whose own
    function does not take what transformers 5 returns).

    Raises:
        IntegrityError: the folder is there, but no CLIP model in safetensors is in it.
    """
    path = folder / "clip"
    if not path.is_dir():
        return Scores(missing=f"{path} is not there")
    model, processor = _load_clip(path)

    def score(image: torch.Tensor, prompt: str) -> float:
        if not torch.isfinite(image).all():
            return 0.0
        inputs = processor(
            text=[prompt],
            images=[picture(image)],
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
        )
        with torch.no_grad():
            found = model(**inputs)
        return max(100 * float((found.image_embeds * found.text_embeds).sum()), 0.0)

    def scores(one: Run) -> tuple[float, ...]:
        return tuple(score(i, p) for i, p in zip(one.images, one.prompts, strict=True))

    return Scores(scores(run), scores(reference))


def _load_clip(path: Path) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    # A stage has progress lines of its own.
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    # transformers makes up what is missing: default settings, an empty vocabulary, random weights.
    problem = ", ".join(
        " or ".join(names)
        for names in _CLIP_FILES
        if not any((path / name).is_file() for name in names)
    )
    try:
        if problem:
            raise ValueError(f"no {problem}")
        processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
        loaded: Any = CLIPModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"no weights {', '.join(missing[:3])}; {len(missing)} in all")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise IntegrityError(
            f"{path} holds no CLIP model",
            expected="config.json, model.safetensors, tokenizer and image processor, as\n"
            "transformers' save_pretrained writes them",
            found=str(error),
            fix="put a whole one there, or remove the folder",
        ) from error
    return model.eval(), processor


def _check_weights(path: Path) -> None:
    """Compare the file with its name, and read it as torch.hub does not: tensors and no code."""
    found = sha256_of_file(path)[:8]
    try:
        if found != (expected := path.stem.rsplit("-", 1)[1]):
            raise ValueError(f"its SHA-256 begins with {found}, not {expected}")
        torch.load(path, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise IntegrityError(
            f"{path} is not torchvision's AlexNet",
            expected="as torchvision.models.AlexNet_Weights downloads it",
            found=str(error),
            fix="put a good copy there, or remove the file",
        ) from error


@contextlib.contextmanager
def _torch_hub(folder: Path) -> Iterator[None]:
    """Let torch.hub, through which torchvision reads its weights, look into ``folder``."""
    kept = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        yield
    finally:
        torch.hub.set_dir(kept)
