"""The weights of a bundle: those of the model, cast, under the names that the library takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusion_engines.backends.inductor.settings import LAYOUT, WEIGHTS
from diffusion_engines.errors import BuildError
from diffusion_engines.families import family_of
from diffusion_engines.files import read_json
from diffusion_engines.manifests import Engine
from diffusion_engines.runtime.networks import load_network


def add_weights(folder: Path, manifest: Engine, weights: Path) -> None:
    """Write ``weights.safetensors`` into a bundle: equal bytes for every target of a precision.

    Args:
        folder: of the bundle, with the engine's files.
        manifest: of the engine.
        weights: a diffusers folder.

    Raises:
        BuildError: the network has other weights than the engine takes.
    """
    component = family_of(weights).component(manifest.component)
    network = load_network(component, weights / component.folder, manifest.precision)
    have, taken = network.state_dict(), read_json(folder / LAYOUT)
    parts = {name: value.get("parts", [name]) for name, value in taken.items()}
    found = {name: _shape(have, names) for name, names in parts.items() if {*names} <= {*have}}
    wanted = {name: value["shape"] for name, value in taken.items()}
    if wrong := [name for name in wanted if found.get(name) != wanted[name]]:
        raise BuildError(
            f"the weights of {manifest.component} do not fit the engine {manifest.name}",
            expected=f"{wrong[0]} {wanted[wrong[0]]}",
            found=str(found.get(wrong[0], "no such weight")),
            fix="build the engine again: `dvc repro`",
        )
    path = folder / WEIGHTS
    used = sorted(name for names in parts.values() for name in names)
    save_file({name: have[name].contiguous() for name in used}, path)
    # safetensors keeps it from other users, who share a cache.
    path.chmod((folder / LAYOUT).stat().st_mode)


def _shape(have: Mapping[str, torch.Tensor], names: Sequence[str]) -> list[int]:
    """Return the shape of weights one below the other."""
    first = have[names[0]].shape
    if len(names) == 1:
        return [*first]
    return [sum(have[name].shape[0] for name in names), *first[1:]]
