"""The README's Python runs as it stands, on the engines of the tiny model."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_engines import layout
from tests.conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def workspace(tiny_bundles: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundles, tmp_path / layout.bundles("cpu"))
    return tmp_path


def run_block(call: str, folder: Path) -> str:
    (code,) = [block for block in BLOCKS if call in block]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_serving_example_paints_what_diffusers_paints(
    workspace: Path, tiny_weights: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    (code,) = [block for block in BLOCKS if "load_pipeline(" in block]
    assert len([line for line in code.splitlines() if line]) <= 10
    run_block("load_pipeline(", workspace)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_weights, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        "A big banana leaf with lemons in front of it",
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(42),
    ).images
    found = np.asarray(Image.open(workspace / "lemons.png")).astype(int)
    assert found.std() > 2
    assert np.abs(found - np.asarray(expected)).max() <= 1


def test_the_component_example_prints_what_an_engine_takes(workspace: Path) -> None:
    printed = run_block("load_component(", workspace).splitlines()
    assert printed == [
        "latents (batch 2, channels 4, height 16, width 16)",
        "timestep (steps 1)",
        "text embeddings (batch 2, tokens 77, features 32)",
    ]


def test_every_python_block_is_run_here() -> None:
    # The one for TensorRT needs a GPU (docs/verified.md).
    assert len([block for block in BLOCKS if "torch_tensorrt" not in block]) == 2
