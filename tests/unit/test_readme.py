"""The README's Python runs as it stands, and its tables and links are complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_engines import layout
from tests.conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Headings, as web pages of repositories name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        found = page.parent / path if path else page
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


@pytest.mark.parametrize("kind", ["fleet", "model", "stage"])
def test_tables_list_every_option(kind: str) -> None:
    if kind == "stage":
        names = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    else:
        names = [path.stem for path in (ROOT / "conf" / kind).glob("*.yaml")]
    listed = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    missing = set(names) - set(re.findall(r"`([\w-]+)`", " ".join(listed)))
    assert not missing - {"tiny", "sd14-synthetic"}  # for the tests; said in the text


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
