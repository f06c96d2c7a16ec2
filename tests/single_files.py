"""A checkpoint in one file of any diffusers folder, as model-sharing sites have them.

What `stages/download.py` reads with `model.source=file`, the other way round.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file, save_file

from diffusion_engines.families import family_of

Tensors = dict[str, torch.Tensor]
_NAMES: Any = DIFFUSERS_TO_LDM_MAPPING
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
    ".self_attn": ".attn",
}


def write_single_file(folder: Path, path: Path) -> None:
    """Write the weights of a diffusers folder as one safetensors file."""
    unet = json.loads((folder / "unet/config.json").read_text())
    networks = {
        component.folder: load_file(next((folder / component.folder).glob("*.safetensors")))
        for component in family_of(folder).components.values()
    }
    whole: Tensors = {}
    whole |= _renamed(networks["unet"], "model.diffusion_model.", _unet_names(unet))
    whole |= _vae(networks["vae"])
    if "text_encoder_2" in networks:
        whole |= _clip(networks["text_encoder"], "conditioner.embedders.0.transformer.")
        whole |= _open_clip(networks["text_encoder_2"], "conditioner.embedders.1.model.")
    else:
        whole |= _clip(networks["text_encoder"], "cond_stage_model.transformer.")
    save_file(whole, path)


def _renamed(tensors: Tensors, prefix: str, name_of: Callable[[str], str]) -> Tensors:
    return {prefix + name_of(name): tensor.contiguous() for name, tensor in tensors.items()}


def _replaced(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _parts(pattern: str, name: str) -> tuple[str, ...]:
    found = re.match(pattern, name)
    assert found, name
    return found.groups()


def _unet_names(config: dict[str, Any]) -> Callable[[str], str]:
    depth = config["layers_per_block"] + 1
    mapping = _NAMES["unet"]
    flat = mapping["layers"] | mapping["addition_embed_type"]

    def name_of(name: str) -> str:
        if name in flat:
            return str(flat[name])
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            side, block, kind, layer, rest = found.groups()
            first = int(block) * depth
            if kind == "downsamplers":
                return f"input_blocks.{first + depth}.0.op.{rest.removeprefix('conv.')}"
            if kind == "upsamplers":
                last = first + depth - 1
                attends = "CrossAttn" in config["up_block_types"][int(block)]
                return f"output_blocks.{last}.{2 if attends else 1}.{rest}"
            place = int(layer) + first + (side == "down")
            blocks = "input_blocks" if side == "down" else "output_blocks"
            return (
                f"{blocks}.{place}.0.{_replaced(rest, _RESNET)}"
                if kind == "resnets"
                else f"{blocks}.{place}.1.{rest}"
            )
        kind, layer, rest = _parts(r"mid_block\.(\w+)\.(\d+)\.(.*)", name)
        if kind == "resnets":
            return f"middle_block.{2 * int(layer)}.{_replaced(rest, _RESNET)}"
        return f"middle_block.1.{rest}"

    return name_of


def _vae(tensors: Tensors) -> Tensors:
    flat = _NAMES["vae"]
    levels = 1 + max(
        int(found[1]) for name in tensors if (found := re.search(r"up_blocks\.(\d+)", name))
    )

    def name_of(name: str) -> str:
        if name in flat:
            return str(flat[name])
        name = name.replace("conv_shortcut", "nin_shortcut")
        if found := re.match(
            r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name
        ):
            half, side, block, kind, layer, rest = found.groups()
            place = int(block) if side == "down" else levels - 1 - int(block)
            if kind == "resnets":
                return f"{half}.{side}.{place}.block.{layer}.{rest}"
            return f"{half}.{side}.{place}.{side}sample.{rest}"
        half, kind, layer, rest = _parts(r"(encoder|decoder)\.mid_block\.(\w+)\.(\d+)\.(.*)", name)
        if kind == "resnets":
            return f"{half}.mid.block_{int(layer) + 1}.{rest}"
        return f"{half}.mid.attn_1.{_replaced(rest, _ATTENTION)}"

    renamed = _renamed(tensors, "first_stage_model.", name_of)
    return {  # attention was a convolution of 1×1
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def _clip(tensors: Tensors, prefix: str) -> Tensors:
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in tensors.items()
    }


def _open_clip(tensors: Tensors, prefix: str) -> Tensors:
    mapping = _NAMES["openclip"]
    return dict(_open_clip_tensors(tensors, prefix, mapping["layers"]))


def _open_clip_tensors(
    tensors: Tensors, prefix: str, flat: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            yield prefix + flat[name], tensor.T.contiguous()
        elif name in flat:
            yield prefix + flat[name], tensor
        elif found := re.match(r"(.*)\.q_proj\.(weight|bias)", name):
            stem, kind = found.groups()
            parts = [tensors[f"{stem}.{one}_proj.{kind}"] for one in "qkv"]
            layer = _replaced(stem.removeprefix("text_model."), _OPEN_CLIP)
            yield f"{prefix}{layer}.in_proj_{kind}", torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            yield prefix + _replaced(name.removeprefix("text_model."), _OPEN_CLIP), tensor
