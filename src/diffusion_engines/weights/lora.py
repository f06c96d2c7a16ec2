"""Read LoRA files, in the formats that people have, as low-rank changes of named layers.

diffusers renames the layers of every format that it knows (its own, PEFT's, kohya's with the block
numbers of SD and SDXL). What it passes over with a warning, or does not notice, is an error here: a
LoRA is fused whole or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffusion_engines.errors import ConfigError, WeightsError
from diffusion_engines.families import FAMILIES
from diffusion_engines.families.base import Family
from diffusion_engines.files import sha256_of_file

# The parts of a LoRA by the networks of a diffusers folder that they are for, in any family: one
# for another family is told so by its networks.
_NETWORKS = sorted({n for family in FAMILIES.values() if family.lora for n in family.lora.networks})
_FACTOR = re.compile(rf"({'|'.join(_NETWORKS)})\.(.+)\.lora_(A|B)\.weight")
_FORMATS = (
    "layers named as diffusers (unet.….lora_A.weight, text_encoder.….lora_A.weight) or kohya\n"
    "(lora_unet_….lora_down.weight, lora_te_….lora_down.weight, with .alpha) names them"
)
_HEADER = "lora_adapter_metadata"  # where diffusers keeps PEFT's LoraConfig, as JSON
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to the weight of one layer: ``scale · up · down``.

    Attributes:
        down: (rank, in) of a linear layer, (rank, in, height, width) of a convolution.
        up: (out, rank), or (out, rank, 1, 1).
        scale: alpha / rank, or alpha / √rank of a rank-stabilized LoRA (arXiv:2312.03732).
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the product has this shape; a 1×1 convolution and a linear layer are alike."""
        return (
            len(shape) >= 2
            and tuple(self.up.flatten(1).shape) == (shape[0], self.down.shape[0])
            and _without_trailing_ones(self.down.shape[1:]) == _without_trailing_ones(shape[1:])
        )

    def delta(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the change of a weight of ``shape``, in fp32, whatever the file's dtype."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (self.scale * product).reshape(shape)


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] if all(size == 1 for size in shape[1:]) else tuple(shape)


@dataclass(frozen=True)
class Lora:
    """A LoRA file, read: ``layers`` by network, then by the layer's name in it."""

    file: str
    sha256: str
    weight: float
    layers: Mapping[str, Mapping[str, LowRank]]


def read_lora(
    folder: Path, file: str, weight: float, family: Family, denoiser: Mapping[str, Any]
) -> Lora:
    """Read a LoRA's layers from ``folder / file``.

    Args:
        folder: that DVC watches.
        file: safetensors, relative to it.
        weight: by which it will be multiplied.
        family: of the model.
        denoiser: the config of the model's denoiser, from which block numbers follow.

    Raises:
        ConfigError: there are no LoRAs for the family.
        WeightsError: the file is missing, is no safetensors, has a NaN, or has anything in it
            besides the two factors and the alpha of layers.
    """
    path = folder / file
    tensors, header = read_tensors(path, folder, "LoRA", "model.loras")
    named, alphas = _diffusers_names(path, tensors, family, denoiser)
    _check_names(path, tensors, named)

    layers: dict[str, dict[str, LowRank]] = {}
    for network, layer in sorted({(m[1], m[2]) for m in map(_FACTOR.fullmatch, named) if m}):
        pair = [named.get(f"{network}.{layer}.lora_{factor}.weight") for factor in "AB"]
        down, up = pair
        if down is None or up is None or min(down.ndim, up.ndim) < 2:
            shapes = (tuple(factor.shape) if factor is not None else "no" for factor in pair)
            raise WeightsError(
                f"{path}: {network}.{layer} is no low-rank change",
                expected="two factors, lora_A (or lora_down) and lora_B (or lora_up), of 2 or 4\n"
                "dimensions",
                found="{} lora_A, {} lora_B".format(*shapes),
                fix="get the LoRA again, or from whoever trained it",
            )
        scale = _scale(network, layer, down.shape[0], alphas, header)
        layers.setdefault(network, {})[in_checkpoint(layer)] = LowRank(down, up, scale)
    if not any(
        bool(factors.up.any()) and bool(factors.down.any())
        for network in layers.values()
        for factors in network.values()
    ):
        raise WeightsError(
            f"{path} changes nothing",
            expected=_FORMATS,
            found="no layers" if not layers else "zeros, as before the first step of training",
            fix="choose another file, or remove it from model.loras (conf/lora/)",
        )
    return Lora(file, sha256_of_file(path), weight, layers)


def read_tensors(
    path: Path, folder: Path, kind: str, key: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return all tensors of a file, checked, and PEFT's settings where the header has them.

    Args:
        path: of the file.
        folder: that DVC watches.
        kind: what it is called in messages.
        key: of the config that names it.

    Raises:
        WeightsError: the file is missing, is no safetensors, or has a NaN.
    """
    if not path.is_file():
        there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors"))
        raise WeightsError(
            f"the {kind} {path} does not exist",
            expected=f"a file of {key} below model.lora_folder, {folder}",
            found=", ".join(there[:12]) or f"no safetensors in {folder}",
            fix="copy it there, and `dvc add` it, so that other machines and queued experiments\n"
            f"have it too; or correct {key} (conf/lora/)",
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except SafetensorError as error:
        with path.open("rb") as start:
            pickled = start.read(4).startswith(_PICKLE_MAGIC)
        raise WeightsError(
            f"{path} is not a whole safetensors file",
            found="a pickle" if pickled else f"{path.stat().st_size} bytes; {error}",
            fix=f"pickles can run code when loaded and are not read here: get the {kind} as\n"
            "safetensors"
            if pickled
            else "it was probably truncated by an interrupted copy: get it again",
        ) from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"{path}: {name} has NaN or infinite values",
                fix="its training diverged or overflowed: take an earlier checkpoint of it",
            )
    return tensors, header


def _diffusers_names(
    path: Path, tensors: Mapping[str, torch.Tensor], family: Family, denoiser: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the factors as ``unet.….lora_A.weight``, and the alphas as ``unet.…``."""
    if family.lora is None:
        raise ConfigError(
            f"model.loras: a {family.class_name} takes no LoRAs here",
            expected="no LoRA",
            found=str(path),
            fix="model.loras=[] (conf/lora/)",
        )
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in tensors):
        raise WeightsError(
            f"{path} is a DoRA",
            expected="a LoRA: two factors per layer and nothing else",
            fix="merge it into the checkpoint with the tool that trained it, and take that with\n"
            "model.source=local",
        )
    try:
        renamed, kohya_alphas = family.lora.names(tensors, denoiser)
    except (ValueError, KeyError, IndexError) as error:  # at names that it does not understand
        raise _unknown_layers(path, sorted(tensors), str(error).strip("'\" ")) from error
    factors, alphas = {}, {}
    for old, value in {**renamed, **(kohya_alphas or {})}.items():
        name = _peft_name(old, family.denoiser.folder)
        if name.endswith(".alpha"):
            # That of an attention layer comes out as `….lora_A.weight.alpha`.
            alphas[name.removesuffix(".alpha").removesuffix(".lora_A.weight")] = float(value)
        else:
            factors[name] = value
    return factors, alphas


def _peft_name(name: str, denoiser: str) -> str:
    """Return one name of diffusers' older formats as PEFT has it."""
    from diffusers.utils import state_dict_utils

    mappings = (
        (state_dict_utils.UNET_TO_DIFFUSERS,)
        if name.startswith(f"{denoiser}.")
        else (state_dict_utils.DIFFUSERS_OLD_TO_PEFT, state_dict_utils.DIFFUSERS_TO_PEFT)
    )
    for mapping in mappings:
        (name,) = state_dict_utils.convert_state_dict({name: None}, mapping)  # type: ignore[no-untyped-call]
    return name


def _check_names(path: Path, tensors: Mapping[str, torch.Tensor], named: Mapping[str, Any]) -> None:
    """Raise WeightsError where a tensor is no factor of a layer, or was lost in the renaming."""
    unknown = sorted(name for name in named if not _FACTOR.fullmatch(name))
    if unknown:
        raise _unknown_layers(path, unknown)
    given = [name for name in tensors if not name.endswith(".alpha")]
    if len(given) != len(named):
        raise _unknown_layers(path, sorted(given), "names of two formats in one file")


def _unknown_layers(path: Path, names: list[str], found: str = "") -> WeightsError:
    return WeightsError(
        f"{path} has tensors that belong to no layer of a LoRA for Stable Diffusion: "
        f"{first(names)}",
        expected=_FORMATS,
        found=found[:300],
        fix="take a LoRA for this kind of model; LoHa, LoKr, embeddings and biases are not read",
    )


def first(names: list[str], count: int = 3) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _scale(
    network: str, layer: str, rank: int, alphas: Mapping[str, float], header: Mapping[str, Any]
) -> float:
    """Return what the product is multiplied by: each layer has its own alpha.

    Without diffusers, whose 0.42 gives every attention layer the same one, or none.
    """
    from peft.utils.other import get_pattern_key

    settings = {
        key.removeprefix(f"{network}."): value
        for key, value in header.items()
        if key.startswith(f"{network}.")
    }
    alpha = alphas.get(f"{network}.{layer}")
    if alpha is None:
        patterns = settings.get("alpha_pattern") or {}
        usual = settings.get("lora_alpha", rank)
        alpha = float(patterns.get(get_pattern_key(list(patterns), layer), usual))
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def in_checkpoint(name: str) -> str:
    """Return a layer's name without the level that transformers 5 dropped from CLIPTextModel."""
    return name.removeprefix("text_model.")
