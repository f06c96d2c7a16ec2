"""The models of conf/model/ at reduced width: real architectures with few channels and layers."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from diffusion_engines import manifests
from diffusion_engines.config import Image
from diffusion_engines.families import family_of
from diffusion_engines.runtime.networks import network_class
from diffusion_engines.weights.sources import fill_with_random_weights
from tests.conftest import ROOT
from tests.manifests import weights_manifest

# Each kind once: SD 1.5 is SD 1.4's architecture.
MODELS = ("sd15", "sd21", "sdxl", "sdxl-turbo")
# Channels per group, per attention head of a UNet, and per attention head of a text encoder.
_GROUPS, _UNET_HEAD, _TEXT_HEAD = 8, 8, 4
_LAYERS = 3
# Models that differ in the VAE alone: TAESD, and the normalized latents of Playground 2.5.
TINY_VAE = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [_GROUPS] * 4,
    "decoder_block_out_channels": [_GROUPS] * 4,
}
NORMALIZING_VAE = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}


def section(model: str, name: str) -> dict[str, Any]:
    """Return a section of a model's file, with what it inherits."""
    content = yaml.safe_load((ROOT / f"conf/model/{model}.yaml").read_text())
    base = [item for item in content.get("defaults", []) if isinstance(item, str)]
    inherited = section(base[0], name) if base and base[0] != "_self_" else {}
    return inherited | content.get(name, {})


def small_image(model: str, edge: int = 128) -> Image:
    """Return the image section of a model for small squares."""
    return Image(**(section(model, "image") | {"height": edge, "width": edge}))


def reduce_architecture(source: Path, folder: Path) -> None:
    """Copy a diffusers folder of JSONs with fewer channels and layers.

    Every key that decides the structure stays: numbers of heads, kinds of blocks, projections,
    added conditions. What must fit together still does: the UNet's context is as wide as the hidden
    states of all text encoders, its added condition as the pooled embedding and the sinusoids.
    """
    shutil.copytree(source, folder)  # links become files
    contexts, pooled = 0, 0
    for spec in family_of(folder).components.values():
        if spec.library != "transformers":
            continue
        config = _read(folder / spec.folder)
        width = config["num_attention_heads"] * _TEXT_HEAD
        config |= {"hidden_size": width, "intermediate_size": 4 * width}
        config |= {"projection_dim": width, "num_hidden_layers": _LAYERS}
        _write(folder / spec.folder, config)
        contexts, pooled = contexts + width, width
    _write(folder / "unet", _reduced_unet(_read(folder / "unet"), contexts, pooled))
    vae = _read(folder / "vae")
    vae["block_out_channels"] = [channels // 16 for channels in vae["block_out_channels"]]
    _write(folder / "vae", vae | {"norm_num_groups": _GROUPS, "layers_per_block": 1})


def _reduced_unet(config: dict[str, Any], context: int, pooled: int) -> dict[str, Any]:
    # In these configs `attention_head_dim` is the number of heads, by level or for all.
    heads, levels = config["attention_head_dim"], config["block_out_channels"]
    by_level = heads if isinstance(heads, list) else [heads] * len(levels)
    reduced = {
        "block_out_channels": [count * _UNET_HEAD for count in by_level],
        "cross_attention_dim": context,
        "layers_per_block": 1,
        "norm_num_groups": _GROUPS,
    }
    if "transformer_layers_per_block" in config:
        layers = config["transformer_layers_per_block"]
        reduced["transformer_layers_per_block"] = [min(count, 2) for count in layers]
    if config.get("addition_embed_type") == "text_time":
        reduced["addition_time_embed_dim"] = 32
        reduced["projection_class_embeddings_input_dim"] = pooled + 6 * 32
    return config | reduced


def leave_out_defaults(folder: Path) -> None:
    """Take from the configs of a diffusers folder all that its libraries would fill in.

    No published config lacks more than this. The VAE's ``scaling_factor`` goes too, as public
    copies of SD 2.1-base have it. The UNet says that diffusers 0.2.2 wrote it, as SD 1.4's does.
    """
    family = family_of(folder)
    for component in family.components.values():
        config = _read(folder / component.folder)
        cls = network_class(component)
        if component.library == "transformers":
            defaults = cls.config_class().to_dict()
        else:
            signature = inspect.signature(cls.__init__).parameters
            defaults = {name: parameter.default for name, parameter in signature.items()}
        kept = {
            key: value
            for key, value in config.items()
            if json.dumps(defaults.get(key)) != json.dumps(value)
        }
        kept.pop("scaling_factor", None)
        if component is family.denoiser:
            kept["_diffusers_version"] = "0.2.2"
        _write(folder / component.folder, kept)


def change_vae(folder: Path, changes: dict[str, Any]) -> None:
    """Change the VAE's config in a diffusers folder of JSONs; with a class, it is another VAE."""
    if "_class_name" not in changes:
        _write(folder / "vae", _read(folder / "vae") | changes)
        return
    _write(folder / "vae", changes)
    index = folder / "model_index.json"
    vae = ["diffusers", changes["_class_name"]]
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": vae}))


def write_reduced_weights(
    model: str, folder: Path, *, sparse: bool = False, vae: dict[str, Any] | None = None
) -> Path:
    """Write random weights of a model at reduced width, with manifests as `download` does.

    Its configs have the keys of the published ones; ``sparse``: those that have no default.
    ``vae``: as of :func:`change_vae`.
    """
    architecture, weights = folder / "architecture", folder / "weights"
    reduce_architecture(ROOT / section(model, "model")["folder"], architecture)
    if vae is not None:
        change_vae(architecture, vae)
    if sparse:
        leave_out_defaults(architecture)
    weights.mkdir()
    fill_with_random_weights(architecture, weights, seed=0, dtype="fp32")
    for name in family_of(weights).folders:
        manifests.write(weights / name, weights_manifest(model=model))
    return weights


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def _write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
