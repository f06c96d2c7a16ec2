"""Exported programs: the same bytes anywhere, and nothing of the weights in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_engines.config import Dynamic
from diffusion_engines.errors import BuildError
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.programs import reading
from diffusion_engines.programs.reading import CONSTANTS, PROGRAM, read_program
from diffusion_engines.programs.writing import write_program
from diffusion_engines.runtime.networks import read_config
from diffusion_engines.weights.sources import fill_with_random_weights
from tests.conftest import IMAGE, ROOT, STATIC, TINY, load
from tests.tiers import long


def export(weights: Path, name: str, folder: Path, dynamic: Dynamic = STATIC) -> Path:
    component = FAMILY.component(name)
    network = weights / component.folder
    folder.mkdir(parents=True)
    inputs = component.inputs(read_config(component, network), IMAGE, dynamic)
    write_program(component, network, inputs, folder, precision="fp32")
    return folder


@long
def test_two_processes_in_two_folders_write_equal_bytes(tiny_weights: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_programs import export\n"
        "export(Path(sys.argv[1]), 'unet', Path(sys.argv[2]))"
    )
    written = []
    for name, seed in (("one", "1"), ("another/place", "2")):
        folder = tmp_path / name
        subprocess.run(
            [sys.executable, "-c", code, str(tiny_weights), str(folder)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            check=True,
            cwd=tmp_path,
        )
        written.append((folder / PROGRAM).read_bytes())
    assert written[0] == written[1]
    for path in (str(ROOT), str(tmp_path), sys.prefix):
        assert path.encode() not in written[0]


def test_other_weights_have_the_same_program(tiny_weights: Path, tmp_path: Path) -> None:
    fill_with_random_weights(TINY, tmp_path / "weights", seed=1, dtype="fp32")
    pair = [
        export(weights, "text_encoder", tmp_path / name)
        for name, weights in (("a", tiny_weights), ("b", tmp_path / "weights"))
    ]
    for file in (PROGRAM, CONSTANTS):
        assert (pair[0] / file).read_bytes() == (pair[1] / file).read_bytes()


def test_a_program_computes_what_its_network_does(tiny_weights: Path, tmp_path: Path) -> None:
    loaded = load(tiny_weights, "vae_decoder")
    folder = export(tiny_weights, "vae_decoder", tmp_path / "program")
    program = read_program(folder, channels_last=True)
    assert all(value.isnan().all() for value in program.state_dict.values())
    weights = loaded.module.state_dict()
    assert set(program.state_dict) == set(weights)
    module = program.module()
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(weights[name])
        latents = torch.randn(loaded.inputs[0].size)
        torch.testing.assert_close(module(latents), loaded.module(latents), rtol=1e-4, atol=1e-4)


def test_open_dimensions_stay_open(tiny_weights: Path, tmp_path: Path) -> None:
    dynamic = Dynamic(batch_size=[1, 4], height=None, width=None)
    folder = export(tiny_weights, "text_encoder", tmp_path / "program", dynamic)
    (bounds,) = json.loads((folder / PROGRAM).read_bytes())["graph"]["range_constraints"].values()
    assert (bounds["min_val"], bounds["max_val"]) == (1, 4)
    program = read_program(folder, channels_last=False)
    for rows in (1, 3):
        assert program.module()(torch.zeros(rows, 77, dtype=torch.int64)).shape[0] == rows


def test_a_program_of_another_pytorch_is_refused(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(tiny_weights, "text_encoder", tmp_path / "program")
    monkeypatch.setattr(reading, "torch_version", lambda: "9.9.0")
    with pytest.raises(BuildError, match="another version of PyTorch"):
        read_program(folder, channels_last=False)
