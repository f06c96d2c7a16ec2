"""What is put beside the bundles: all that a pipeline needs, no weights, nothing damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusion_engines import manifests
from diffusion_engines.errors import IntegrityError
from diffusion_engines.manifests import FusedLora
from diffusion_engines.serve.pack import copy_pipeline_files
from tests.manifests import weights_manifest


def test_everything_but_the_weights_is_there(tiny_weights: Path, tmp_path: Path) -> None:
    copy_pipeline_files(tiny_weights, tmp_path)
    manifest = manifests.read(tmp_path, manifests.Pipeline)
    for name in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "vae/config.json",
    ):
        assert name in manifest.files
    assert not list(tmp_path.rglob("*.safetensors*"))
    assert (manifest.model, manifest.synthetic) == ("tiny", True)


def test_the_loras_of_every_network_are_listed(weights_copy: Path, tmp_path: Path) -> None:
    entry = FusedLora("ink.safetensors", "0" * 64, 0.8, layers=56)
    manifests.write(weights_copy / "unet", weights_manifest(loras=(entry,)))
    copy_pipeline_files(weights_copy, tmp_path)
    assert manifests.read(tmp_path, manifests.Pipeline).loras == {"unet": (entry,)}


def test_a_damaged_config_is_refused_and_weights_are_not_read(
    weights_copy: Path, tmp_path: Path
) -> None:
    weights = weights_copy / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"damaged")  # for `export` to find: this does not read them
    copy_pipeline_files(weights_copy, tmp_path / "first")
    config = weights_copy / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(IntegrityError, match=r"unet/config\.json"):
        copy_pipeline_files(weights_copy, tmp_path / "second")
