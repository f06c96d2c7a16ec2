"""Models as published in 2022, at reduced width, through the whole DAG to a picture."""

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
from diffusion_engines.families import family_of
from diffusion_engines.layout import Workspace
from diffusion_engines.parity.results import read_validation
from tests.composition import composed
from tests.models import (
    NORMALIZING_VAE,
    TINY_VAE,
    change_vae,
    leave_out_defaults,
    reduce_architecture,
)
from tests.pipeline.conftest import Clone
from tests.tiers import full

pytestmark = [pytest.mark.pipeline, pytest.mark.long]

# Every network on a CPU, one as a GPU gets it.
FLEET = """\
# @package _global_
# Every network on a CPU; for tests.
defaults:
  - /target@targets.cpu: cpu
  - /target@targets.rtx: rtx40
  - /precision@fleet.cpu: fp32
  - /precision@fleet.rtx: fp16
fleet:
  rtx: {only: [%s]}
measure: [cpu]
"""


# In place of the models' own, which are all of the architecture that `sd14` has here.
VAES: dict[str, dict[str, Any]] = {"sd21": TINY_VAE, "sdxl": NORMALIZING_VAE}


def reduce_model(clone: Clone, model: str) -> None:
    """Make a model of the clone narrow, and its pictures small; its configs lack all defaults."""
    folder = clone.path / "conf/architecture" / model
    full = folder.with_name("full")
    folder.rename(full)
    reduce_architecture(full, folder)
    shutil.rmtree(full)
    if model in VAES:
        change_vae(folder, VAES[model])
    leave_out_defaults(folder)
    path = clone.path / f"conf/model/{model}.yaml"
    # Of the full width.
    text = re.sub(r"  parameters:\n(    .*\n)+", "  parameters: {}\n", path.read_text())
    path.write_text(re.sub(r"(height|width): \d+", r"\1: 128", text))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("model", "on_gpu"),
    [
        pytest.param("sd21", "text_encoder", marks=full),  # CI has time for one
        ("sdxl", "text_encoder_2"),
    ],
)
def test_a_model_whose_configs_lack_what_has_a_default_is_served(
    fresh: Clone, model: str, on_gpu: str
) -> None:
    reduce_model(fresh, model)
    (fresh.path / "conf/fleet/small.yaml").write_text(FLEET % on_gpu)
    fresh.compose(f"model={model}", "model.source=synthetic", "fleet=small", "reference=short")

    outcome = fresh.repro()

    built = {f"build@rtx-{on_gpu}", "reference", "validate@cpu", "benchmark@cpu", "generate@cpu"}
    assert built | {"report"} <= outcome.ran
    check_results(Workspace(fresh.path))
    check_configs(fresh, model)
    check_picture(Workspace(fresh.path))
    if model == "sdxl":
        check_conditions_of_sdxl(fresh)
        # A component that another model lacks stops before any work.
        fresh.compose("model=tiny", "fleet=small")
        refused = fresh.repro(check=False)
        assert refused.status != 0
        assert "the model tiny has no text_encoder_2" in refused.output
        assert refused.built == {"check_conf"}


def check_results(workspace: Workspace) -> None:
    """Every component was compared, within the gates, and there are pictures."""
    found = read_validation(workspace.validation("cpu"))
    parts = {part.component: part.worst for part in found.components}
    assert set(parts) == set(family_of(workspace.weights).components)
    assert found.misses == ()
    assert max(part.rel_l2 for part in parts.values()) < 1e-4
    assert (workspace.images("cpu") / "image-00.png").is_file()


def check_configs(clone: Clone, architecture: str) -> None:
    """The weights have the configs as published, without what has a default."""
    published = clone.path / "conf/architecture" / architecture
    for config in published.glob("*/config.json"):
        copy = Workspace(clone.path).weights / config.parent.name / "config.json"
        assert copy.read_bytes() == config.read_bytes()
        left = read(config)
        assert "time_cond_proj_dim" not in left
        assert left.get("scaling_factor") != 0.18215  # AutoencoderKL's default


def check_picture(workspace: Workspace) -> None:
    """The picture of the engines is that of diffusers' own networks."""
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


def check_conditions_of_sdxl(clone: Clone) -> None:
    """What SDXL has besides: a second text encoder with two outputs, a second tokenizer."""
    artifacts = clone.path / "artifacts"
    manifest = read(artifacts / "bundles/rtx/text_encoder_2/manifest.json")
    assert [value["role"] for value in manifest["outputs"]] == ["hidden state", "pooled embedding"]
    assert (artifacts / "bundles/cpu/pipeline/tokenizer_2/vocab.json").is_file()
    assert "text_encoder_2" in (artifacts / "report/index.html").read_text()
    assert clone.repro().built == set()


def test_sd15_is_of_the_architecture_of_sd14() -> None:
    """So that the case above stands for both."""
    folders = [composed(f"model={name}")["model"]["folder"] for name in ("sd14", "sd15")]
    assert folders == ["conf/architecture/sd14"] * 2
