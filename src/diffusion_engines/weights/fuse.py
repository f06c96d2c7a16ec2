"""Add LoRAs to the weights of a diffusers folder: ``W + Σ weight · scale · up · down``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusion_engines.errors import WeightsError
from diffusion_engines.files import new_file
from diffusion_engines.manifests import FusedLora
from diffusion_engines.progress import progress
from diffusion_engines.weights.check import weight_files
from diffusion_engines.weights.lora import Lora, LowRank, first, in_checkpoint


def fuse_loras(loras: Sequence[Lora], weights: Path) -> dict[str, tuple[FusedLora, ...]]:
    """Add LoRAs to the weights, in place; return what each did, by network, for the manifests.

    Every sum is computed in fp32 and rounded once to the dtype of the weight. LoRAs add up in the
    order of their hashes, so that the order of the config changes no bit. A network that none of
    them changes keeps its files as they are. In memory is one file of one network at a time.

    Args:
        loras: read.
        weights: a diffusers folder without LoRAs.

    Raises:
        WeightsError: a LoRA has layers that the model lacks or that have other shapes, or a sum is
            too large for the dtype; then the folder is of no use.
    """
    ordered = sorted(loras, key=lambda lora: (lora.sha256, lora.weight))
    for lora in ordered:
        _check_layers(lora, weights)
    done: dict[str, tuple[FusedLora, ...]] = {}
    for network in sorted({name for lora in ordered for name in lora.layers}):
        for path in list(weight_files(weights / network)):
            _fuse_file(path, [(lora, lora.layers.get(network, {})) for lora in ordered])
        done[network] = tuple(
            FusedLora(lora.file, lora.sha256, lora.weight, len(lora.layers[network]))
            for lora in ordered
            if network in lora.layers
        )
    return done


def _check_layers(lora: Lora, weights: Path) -> None:
    for network, layers in lora.layers.items():
        if not (weights / network).is_dir():
            raise WeightsError(
                f"the LoRA {lora.file} is for a model with a {network}, which this model lacks",
                found=f"{len(layers)} layers of {network}",
                fix="take a LoRA for this model; one for SDXL has layers of text_encoder_2",
            )
        shapes = dict(_shapes(weights / network))
        if unknown := sorted(name for name in layers if name not in shapes):
            raise WeightsError(
                f"the LoRA {lora.file} is for another model: its {network} has no {first(unknown)}",
                expected=f"layers of this model's {network}",
                found=f"{len(unknown)} of {len(layers)} that it lacks",
                fix="take a LoRA that was trained on this model or on one of the same architecture",
            )
        wrong = [name for name, factors in layers.items() if not factors.fits(shapes[name])]
        if wrong:
            name = min(wrong)
            raise WeightsError(
                f"the LoRA {lora.file} is for another model: {network}.{name} has another shape",
                expected=f"a change of {shapes[name]}",
                found=f"{tuple(layers[name].up.shape)} · {tuple(layers[name].down.shape)}, and "
                f"{len(wrong)} of {len(layers)} layers do not fit",
                fix="take a LoRA that was trained on this model or on one of the same architecture",
            )


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if key.endswith(".weight"):
                    shape = tuple(tensors.get_slice(key).get_shape())
                    yield in_checkpoint(key.removesuffix(".weight")), shape


def _fuse_file(path: Path, loras: Sequence[tuple[Lora, Mapping[str, LowRank]]]) -> None:
    """Rewrite one safetensors file, header and all, with the changes of the layers in it."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        changes = {
            name: [
                (lora.weight, layers[layer])
                for lora, layers in loras
                if (layer := in_checkpoint(name.removesuffix(".weight"))) in layers
            ]
            for name in names
            if name.endswith(".weight")
        }
        if not any(changes.values()):
            return  # a shard without such layers
        metadata = file.metadata()
        tensors = {}
        for name in progress(names, f"fuse {path.parent.name}/{path.name}"):
            tensor = file.get_tensor(name)
            tensors[name] = _add(name, tensor, changes.get(name, []), path)
    with new_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def _add(
    name: str, tensor: torch.Tensor, changes: Sequence[tuple[float, LowRank]], path: Path
) -> torch.Tensor:
    if not changes:
        return tensor
    total = torch.zeros(tensor.shape)
    for weight, factors in changes:
        total += weight * factors.delta(tuple(tensor.shape))
    result = (tensor.float() + total).to(tensor.dtype)
    if not bool(torch.isfinite(result).all()):
        raise WeightsError(
            f"{path.parent.name}: {name} is too large for {tensor.dtype} with its LoRAs",
            found=f"a change of up to {float(total.abs().max()):.3g}",
            fix="lower the weights in model.loras (conf/lora/); they are mostly between 0 and 1.5",
        )
    return result
