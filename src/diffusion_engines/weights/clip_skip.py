"""Leave out the last layers of a text encoder, which many fine-tunes were trained without.

diffusers' ``clip_skip`` takes an earlier hidden state and norms it like the last one: that is the
same network with fewer layers. As weights without those layers nothing later knows of it, and
engines do not compute them; SD 2's text encoder is published so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from diffusion_engines.errors import ConfigError
from diffusion_engines.files import new_file
from diffusion_engines.weights.check import weight_files

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def leave_out_last_layers(folder: Path, count: int) -> None:
    """Take the last layers from a text encoder of a diffusers folder, in place.

    Args:
        folder: of the text encoder: ``config.json`` and safetensors.
        count: of the layers, at least 1 and fewer than it has.

    Raises:
        ConfigError: it has no more than that.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kept = config["num_hidden_layers"] - count
    if kept < 1:
        raise ConfigError(
            f"model.clip_skip leaves nothing of the {folder.name}",
            expected=f"fewer than its {config['num_hidden_layers']} layers",
            found=str(count),
            fix="set model.clip_skip to 1, which other programs call 2, or to 0",
        )
    for file in list(weight_files(folder)):
        _drop(file, kept)
    path.write_text(json.dumps(config | {"num_hidden_layers": kept}, indent=2) + "\n")


def _drop(path: Path, kept: int) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        names = list(file.keys())
        tensors = {
            name: file.get_tensor(name)
            for name in names
            if not ((found := _LAYER.search(name)) and int(found[1]) >= kept)
        }
    with new_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)
