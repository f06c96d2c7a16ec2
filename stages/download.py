"""Get the weights: from the hub at a pinned commit, from a local folder, or random (synthetic).

LoRAs of the config are fused into them, so that no later stage knows of any.

Reads   model.folder (the local model, or the architecture's JSONs), model.lora_folder, the hub
Writes  artifacts/weights/, a diffusers folder in safetensors with a manifest per subfolder
"""

from dataclasses import dataclass, replace
from pathlib import Path

from diffusion_engines import config, manifests
from diffusion_engines.errors import ConfigError
from diffusion_engines.families import family_of
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import FusedLora
from diffusion_engines.params import param
from diffusion_engines.progress import step
from diffusion_engines.runtime.networks import read_config
from diffusion_engines.stage import stage
from diffusion_engines.weights import sources
from diffusion_engines.weights.check import check_parameters, count_parameters, weight_files
from diffusion_engines.weights.fuse import fuse_loras
from diffusion_engines.weights.lora import Lora, read_lora


@dataclass(frozen=True)
class Config:
    model: config.Model = param("model")
    vae_scale_factor: int = param("image.vae_scale_factor")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    model = cfg.model
    loras = read_loras(model)  # what is wrong with them is said before gigabytes are fetched
    with new_folder(workspace.weights) as folder:
        fill(model, folder)
        fused = fuse(loras, folder)
        sources.check_architecture(folder, cfg.vae_scale_factor)
        family = family_of(folder)
        origin = manifests.Weights(
            model=model.name,
            source=model.source,
            repo=model.repo if model.source == "hub" else None,
            revision=model.revision if model.source == "hub" else None,
            synthetic=model.source == "synthetic",
            seed=model.seed if model.source == "synthetic" else None,
        )
        networks = {component.folder for component in family.components.values()}
        for name in family.folders:
            manifest = origin
            if name in networks:
                with step(f"check the weights of {name}"):
                    parameters = count_parameters(folder / name)
                check_parameters(name, model.parameters.get(name), parameters)
                manifest = replace(origin, parameters=parameters, loras=fused.get(name, ()))
            manifests.write(folder / name, manifest)


def read_loras(model: config.Model) -> list[Lora]:
    if not model.loras:
        return []
    family = family_of(Path(model.folder))
    denoiser = read_config(family.denoiser, Path(model.folder) / family.denoiser.folder)
    return [
        read_lora(Path(model.lora_folder), lora.file, lora.weight, family, denoiser)
        for lora in model.loras
    ]


def fuse(loras: list[Lora], folder: Path) -> dict[str, tuple[FusedLora, ...]]:
    if not loras:
        return {}
    with step(f"fuse {len(loras)} LoRA(s)"):
        fused = fuse_loras(loras, folder)
    for lora in loras:
        layers = (f"{len(found)} of {network}" for network, found in sorted(lora.layers.items()))
        print(f"  {lora.file} × {lora.weight:g} changed the layers: {', '.join(layers)}")
    return fused


def fill(model: config.Model, folder: Path) -> None:
    if model.source == "hub":
        if not (model.repo and model.revision):
            raise ConfigError("model.repo and model.revision are needed for the hub (conf/model/)")
        with step(f"download {model.repo}") as running:
            running.now = sources.hub_progress(model.repo)
            wanted = family_of(Path(model.folder)).wanted
            sources.copy_from_hub(model.repo, model.revision, wanted, folder)
    elif model.source == "local":
        for component in family_of(Path(model.folder)).components.values():
            list(
                weight_files(Path(model.folder) / component.folder)
            )  # fails before the copy starts
        with step(f"copy {model.folder}"):
            sources.copy_from_folder(Path(model.folder), folder)
    else:
        with step(f"random weights of {model.name}, seed {model.seed}"):
            sources.fill_with_random_weights(
                Path(model.folder), folder, seed=model.seed, dtype=model.dtype
            )


if __name__ == "__main__":
    main()
