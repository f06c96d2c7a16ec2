"""What a pipeline needs besides engines, so that a target's folder can be served alone."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

from diffusion_engines.files import MANIFEST, read_manifest, write_manifest

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
    info: dict[str, object] = {}
    loras: dict[str, object] = {}
    for path in sorted(weights.glob(f"*/{MANIFEST}")):
        source = path.parent
        manifest = read_manifest(source, "weights", skip=_WEIGHTS)
        info |= {key: manifest.get(key) for key in ("model", "repo", "revision", "synthetic")}
        if fused := manifest.get("loras"):
            loras[source.name] = fused
        for name in manifest["files"]:
            if not fnmatch.fnmatch(name, _WEIGHTS):
                target = folder / source.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target)
    shutil.copyfile(weights / "model_index.json", folder / "model_index.json")
    write_manifest(folder, "pipeline", {**info, "loras": loras})
