"""What a pipeline needs besides engines, so that a target's folder can be served alone."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

from diffusion_engines import manifests
from diffusion_engines.errors import IntegrityError
from diffusion_engines.files import MANIFEST
from diffusion_engines.manifests import Pipeline, Weights

# Of the target's folder; beside the bundles, which are named after components.
PIPELINE = "pipeline"
_WEIGHTS = "*.safetensors*"  # and the index of their shards


def copy_pipeline_files(weights: Path, folder: Path) -> None:
    """Copy tokenizer, noise schedule and the networks' configs into ``folder``, with a manifest.

    Everything of a diffusers folder but the weights, in the same places, so that what reads the
    one reads the other.

    Raises:
        IntegrityError: a file is missing or altered.
    """
    packed = {
        path.parent.name: manifests.read(path.parent, Weights, skip=_WEIGHTS)
        for path in sorted(weights.glob(f"*/{MANIFEST}"))
    }
    if not packed:
        raise IntegrityError(
            f"{weights} has no manifests", expected=f"one in each of its folders: {MANIFEST}"
        )
    for folder_name, manifest in packed.items():
        for name in manifest.files:
            if not fnmatch.fnmatch(name, _WEIGHTS):
                target = folder / folder_name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(weights / folder_name / name, target)
    shutil.copyfile(weights / "model_index.json", folder / "model_index.json")
    origin = next(iter(packed.values()))  # of all folders the same
    manifests.write(
        folder,
        Pipeline(
            model=origin.model,
            repo=origin.repo,
            revision=origin.revision,
            synthetic=origin.synthetic,
            seed=origin.seed,
            loras={name: manifest.loras for name, manifest in packed.items() if manifest.loras},
            weights={name: manifest.digest for name, manifest in packed.items()},
        ),
    )
