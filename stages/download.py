"""Get the weights: from the hub at a pinned commit, a local folder or one file, or random ones.

LoRAs of the config are fused into them, so that no later stage knows of any.

Reads   model.folder (the local model, or the architecture's JSONs), model.checkpoint,
        model.lora_folder, the hub
Writes  artifacts/weights/, a diffusers folder in safetensors with a manifest per subfolder
"""

from dataclasses import dataclass, replace
from pathlib import Path

from diffusion_engines import config, manifests
from diffusion_engines.errors import ConfigError
from diffusion_engines.families import family_of
from diffusion_engines.families.base import Family
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import AddedWord, FusedLora
from diffusion_engines.params import param
from diffusion_engines.progress import step
from diffusion_engines.runtime.networks import read_config
from diffusion_engines.stage import stage
from diffusion_engines.weights import sources
from diffusion_engines.weights.check import check_parameters, count_parameters
from diffusion_engines.weights.clip_skip import leave_out_last_layers
from diffusion_engines.weights.embeddings import Embedding, add_embeddings, read_embedding
from diffusion_engines.weights.fuse import fuse_loras
from diffusion_engines.weights.lora import Lora, read_lora
from diffusion_engines.weights.model import check_model
from diffusion_engines.weights.single_file import fill_from_file


@dataclass(frozen=True)
class Config:
    model: config.Model = param("model")
    vae_scale_factor: int = param("image.vae_scale_factor")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    model = cfg.model
    # What is wrong with these is said before gigabytes are fetched.
    loras, embeddings = read_loras(model), read_embeddings(model)
    with new_folder(workspace.weights) as folder:
        fill(model, folder)
        sources.check_scale_factor(folder, cfg.vae_scale_factor)
        fused = fuse(loras, folder)
        family = family_of(folder)
        networks = {component.folder for component in family.components.values()}
        parameters = {name: count(name, folder) for name in sorted(networks)}
        for name, found in parameters.items():
            check_parameters(name, model.parameters.get(name), found)
        # After the count, which is that of the model as it was published.
        words = add_words(embeddings, folder, family)
        skipped = skip_layers(model.clip_skip, folder, family)
        parameters |= {name: count(name, folder) for name in {*words, *skipped}}
        origin = manifests.Weights(
            model=model.name,
            source=model.source,
            repo=model.repo if model.source == "hub" else None,
            revision=model.revision if model.source == "hub" else None,
            synthetic=model.source == "synthetic",
            seed=model.seed if model.source == "synthetic" else None,
        )
        for name in family.folders:
            manifest = replace(
                origin,
                parameters=parameters.get(name),
                loras=fused.get(name, ()),
                words=words.get(name, ()),
            )
            manifests.write(folder / name, manifest)


def count(name: str, folder: Path) -> int:
    with step(f"check the weights of {name}"):
        return count_parameters(folder / name)


def skip_layers(layers: int, folder: Path, family: Family) -> tuple[str, ...]:
    if not layers:
        return ()
    for name in family.skips:
        leave_out_last_layers(folder / name, layers)
    return family.skips


def read_loras(model: config.Model) -> list[Lora]:
    if not model.loras:
        return []
    family = family_of(Path(model.folder))
    denoiser = read_config(family.denoiser, Path(model.folder) / family.denoiser.folder)
    return [
        read_lora(Path(model.lora_folder), lora.file, lora.weight, family, denoiser)
        for lora in model.loras
    ]


def read_embeddings(model: config.Model) -> list[Embedding]:
    family = family_of(Path(model.folder))
    return [
        read_embedding(Path(model.lora_folder), embedding.file, embedding.word, family)
        for embedding in model.embeddings
    ]


def add_words(
    embeddings: list[Embedding], folder: Path, family: Family
) -> dict[str, tuple[AddedWord, ...]]:
    if not embeddings:
        return {}
    with step(f"add {len(embeddings)} word(s)"):
        added = add_embeddings(embeddings, folder, family)
    for embedding in embeddings:
        print(f"  {embedding.file}: {embedding.word} is {len(embedding.tokens)} token(s)")
    return added


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
            family = family_of(Path(model.folder))
            # What is wrong with the small files is said before gigabytes are fetched.
            sources.copy_from_hub(model.repo, model.revision, family.wanted_first, folder)
            origin = f"{model.repo} at {model.revision}"
            check_model(folder, name=origin, weights=False)
            sources.copy_from_hub(model.repo, model.revision, family.wanted, folder)
        check_model(folder, name=origin)
    elif model.source == "local":
        check_model(Path(model.folder), name=model.folder)  # before the copy starts
        with step(f"copy {model.folder}"):
            sources.copy_from_folder(Path(model.folder), folder)
    elif model.source == "file":
        check_model(Path(model.folder), name=model.folder, weights=False)
        with step(f"read {model.checkpoint}"):
            fill_from_file(Path(model.checkpoint), Path(model.folder), folder)
        check_model(folder, name=model.checkpoint)
    else:
        check_model(Path(model.folder), name=model.folder, weights=False)
        with step(f"random weights of {model.name}, seed {model.seed}"):
            sources.fill_with_random_weights(
                Path(model.folder), folder, seed=model.seed, dtype=model.dtype
            )


if __name__ == "__main__":
    main()
