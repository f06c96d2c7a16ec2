"""Checkpoints in one file, as model-sharing sites give them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_engines.errors import WeightsError
from diffusion_engines.families import family_of
from diffusion_engines.weights.single_file import fill_from_file
from tests.conftest import ROOT, TINY
from tests.models import write_reduced_weights
from tests.single_files import write_single_file

SD14 = ROOT / "conf/architecture/sd14"


def weights_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    networks = {component.folder for component in family_of(folder).components.values()}
    return {name: load_file(next((folder / name).glob("*.safetensors"))) for name in networks}


@pytest.mark.parametrize("model", ["tiny", "sdxl"])
def test_it_gives_the_weights_of_the_diffusers_folder(
    model: str, tiny_weights: Path, tmp_path: Path
) -> None:
    weights = tiny_weights if model == "tiny" else write_reduced_weights(model, tmp_path)
    write_single_file(weights, tmp_path / "one.safetensors")
    fill_from_file(tmp_path / "one.safetensors", weights, tmp_path / "filled")
    for name, expected in weights_of(weights).items():
        found = weights_of(tmp_path / "filled")[name]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        config = f"{name}/config.json"
        assert (tmp_path / "filled" / config).read_bytes() == (weights / config).read_bytes()


@pytest.fixture
def checkpoint(tiny_weights: Path, tmp_path: Path) -> Path:
    write_single_file(tiny_weights, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def refused(checkpoint: Path, architecture: Path, destination: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        fill_from_file(checkpoint, architecture, destination)
    return str(caught.value)


@pytest.mark.parametrize(
    ("halved", "dtype"),
    [("", torch.float16), ("model.", torch.float32)],
    ids=["of fp16", "the denoiser alone"],
)
def test_networks_keep_their_dtype(
    checkpoint: Path, tmp_path: Path, halved: str, dtype: torch.dtype
) -> None:
    tensors = load_file(checkpoint).items()
    mixed = {name: value.half() if name.startswith(halved) else value for name, value in tensors}
    save_file(mixed, checkpoint)
    fill_from_file(checkpoint, TINY, tmp_path / "filled")
    found = weights_of(tmp_path / "filled").values()
    assert {tensor.dtype for network in found for tensor in network.values()} == {dtype}


def test_another_architecture_is_named(checkpoint: Path, tmp_path: Path) -> None:
    assert f"is not of the architecture of {SD14}" in refused(checkpoint, SD14, tmp_path / "a")


@pytest.mark.parametrize("prefix", ["first_stage_model.decoder", "cond_stage_model", "model.diff"])
def test_a_network_that_is_missing_is_named(checkpoint: Path, tmp_path: Path, prefix: str) -> None:
    tensors = load_file(checkpoint)
    dropped = [name for name in tensors if name.startswith(prefix) and "conv_in" not in name][1:]
    save_file({name: tensors[name] for name in tensors if name not in dropped}, checkpoint)
    assert "is not of the architecture" in refused(checkpoint, TINY, tmp_path / "a")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert "there is no such checkpoint" in refused(path, TINY, tmp_path / "a")
    path.write_bytes(b"\x80\x02}q\x00." * 100)
    assert "a .ckpt is a pickle" in refused(path, TINY, tmp_path / "a")
    save_file({"lora_unet_down.alpha": torch.ones(1)}, path)
    assert "model.loras" in refused(path, TINY, tmp_path / "a")
