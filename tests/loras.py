"""Tiny LoRAs for any model folder, in the formats of diffusers and PEFT, and of kohya."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ATTENTION = r"\.(to_(q|k|v|out\.0)|(q|k|v|out)_proj)$"
EVERY_LAYER = r"^(?!.*(norm|embeddings)).*$"
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}


def layers_of(folder: Path, pattern: str = ATTENTION) -> dict[str, tuple[int, ...]]:
    """The layers of one network of a model folder that match, and the shapes of their weights."""
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return {
        key.removesuffix(".weight"): shape
        for key, shape in shapes.items()
        if key.endswith(".weight") and re.search(pattern, key.removesuffix(".weight"))
    }


def factors(shape: tuple[int, ...], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factors of a linear layer or a convolution, as trainers shape them."""
    ones = (1,) * (len(shape) - 2)
    return 0.2 * torch.randn(rank, *shape[1:]), 0.2 * torch.randn(shape[0], rank, *ones)


def write_lora(
    path: Path,
    model: Path,
    networks: Mapping[str, str] | None = None,
    *,
    kohya: bool = False,
    rank: int = 2,
    alphas: tuple[float, ...] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a LoRA with random factors for the layers of each network that match its pattern.

    ``alphas`` go round over the layers, for kohya; ``settings`` is PEFT's LoraConfig of the UNet.
    """
    torch.manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for network, pattern in (networks or {"unet": ATTENTION}).items():
        for index, (layer, shape) in enumerate(layers_of(model / network, pattern).items()):
            down, up = (factor.to(dtype) for factor in factors(shape, rank))
            if kohya:
                name = _KOHYA[network] + layer.replace(".", "_")
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                if alphas:
                    tensors[f"{name}.alpha"] = torch.tensor(alphas[index % len(alphas)])
            else:
                name = f"{network}.{layer}"
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    header = {"format": "pt"}
    if settings:
        named = {f"unet.{key}": value for key, value in settings.items()}
        header["lora_adapter_metadata"] = json.dumps(named)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=header)
    return path
