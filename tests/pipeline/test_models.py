"""Models at reduced width through the whole DAG: SDXL's networks, and configs of 2022."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffusion_engines import load_pipeline
from diffusion_engines.layout import Workspace
from diffusion_engines.parity.results import read_validation
from tests.models import leave_out_defaults, reduce_architecture
from tests.pipeline.conftest import Clone

pytestmark = [pytest.mark.pipeline, pytest.mark.long]

# Components without an engine run in PyTorch.
FLEET = """\
# @package _global_
# Two of SDXL's networks; for tests.
defaults:
  - /target@targets.cpu: cpu
  - /target@targets.rtx: rtx40
  - /precision@fleet.cpu: fp32
  - /precision@fleet.rtx: fp16
fleet:
  cpu: {only: [text_encoder_2, unet]}
  rtx: {only: [text_encoder_2]}
measure: [cpu]
"""


def reduce_model(clone: Clone, model: str, architecture: str, *, sparse: bool) -> None:
    """Make a model of the clone narrow, and its pictures small."""
    folder = clone.path / "conf/architecture" / architecture
    full = folder.with_name("full")
    folder.rename(full)
    reduce_architecture(full, folder)
    shutil.rmtree(full)
    if sparse:
        leave_out_defaults(folder)
    for path in {clone.path / f"conf/model/{name}.yaml" for name in (model, architecture)}:
        # Of the full width.
        text = re.sub(r"  parameters:\n(    .*\n)+", "  parameters: {}\n", path.read_text())
        path.write_text(re.sub(r"(height|width): \d+", r"\1: 128", text))


@pytest.fixture
def sdxl(fresh: Clone) -> Clone:
    reduce_model(fresh, "sdxl", "sdxl", sparse=False)
    (fresh.path / "conf/fleet/small.yaml").write_text(FLEET)
    fresh.compose("model=sdxl", "model.source=synthetic", "fleet=small", "reference=short")
    return fresh


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_sdxl_is_built_validated_timed_and_painted(sdxl: Clone) -> None:
    outcome = sdxl.repro()
    assert {"build@rtx-text_encoder_2", "validate@cpu", "benchmark@cpu", "report"} <= outcome.ran
    artifacts = sdxl.path / "artifacts"
    found = read_validation(Workspace(sdxl.path).validation("cpu"))
    parts = {part.component: part.worst for part in found.components}
    assert set(parts) == {"text_encoder_2", "unet"}
    assert found.misses == ()
    assert parts["text_encoder_2"].rel_l2 < 1e-4
    assert (artifacts / "images/cpu/image-00.png").is_file()
    manifest = read(artifacts / "bundles/rtx/text_encoder_2/manifest.json")
    assert [value["role"] for value in manifest["outputs"]] == ["hidden state", "pooled embedding"]
    assert (artifacts / "bundles/cpu/pipeline/tokenizer_2/vocab.json").is_file()
    assert "text_encoder_2" in (artifacts / "report/index.html").read_text()
    assert sdxl.repro().built == set()

    # A component that another model lacks stops before any work.
    sdxl.compose("model=tiny", "fleet=small")
    refused = sdxl.repro(check=False)
    assert refused.status != 0
    assert "the model tiny has no text_encoder_2" in refused.output
    assert refused.built == {"check_conf"}


EVERY_NETWORK = """\
# @package _global_
# Every network on a CPU; for tests.
defaults:
  - /target@targets.cpu: cpu
  - /precision@fleet.cpu: fp32
measure: [cpu]
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "architecture"),
    [("sd14", "sd14"), ("sd15", "sd14"), ("sd21", "sd21"), ("sdxl", "sdxl")],
)
def test_a_model_whose_configs_lack_what_has_a_default_is_served(
    fresh: Clone, model: str, architecture: str
) -> None:
    reduce_model(fresh, model, architecture, sparse=True)
    (fresh.path / "conf/fleet/small.yaml").write_text(EVERY_NETWORK)
    fresh.compose(f"model={model}", "model.source=synthetic", "fleet=small", "reference=short")
    assert {"reference", "validate@cpu", "generate@cpu", "report"} <= fresh.repro().ran
    workspace = Workspace(fresh.path)
    published = fresh.path / "conf/architecture" / architecture
    for config in published.glob("*/config.json"):
        copy = workspace.weights / config.parent.name / "config.json"
        assert copy.read_bytes() == config.read_bytes()
        left = read(config)
        assert "time_cond_proj_dim" not in left
        assert left.get("scaling_factor") != 0.18215  # AutoencoderKL's default; SDXL's is its own
    own: Any = diffusers.DiffusionPipeline.from_pretrained(
        workspace.weights, dtype=torch.float32, use_safetensors=True
    )
    images = []
    for pipeline in (own, load_pipeline(workspace.bundles("cpu"))):
        pipeline.set_progress_bar_config(disable=True)
        images.append(
            pipeline(
                "lemons",
                num_inference_steps=2,
                height=128,
                width=128,
                generator=torch.Generator().manual_seed(3),
                output_type="pt",
            ).images
        )
    assert images[0].std() > 0.01  # a picture, not one colour
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-4)
