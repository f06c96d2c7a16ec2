"""SDXL at reduced width through the whole DAG: two text encoders, one of them with two outputs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from diffusion_engines.layout import Workspace
from diffusion_engines.parity.results import read_validation
from tests.models import reduce_architecture
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


@pytest.fixture
def sdxl(fresh: Clone) -> Clone:
    folder = fresh.path / "conf/architecture/sdxl"
    folder.rename(fresh.path / "full")
    reduce_architecture(fresh.path / "full", folder)
    shutil.rmtree(fresh.path / "full")
    model = fresh.path / "conf/model/sdxl.yaml"
    # Of the full width.
    text = re.sub(r"  parameters:\n(    .*\n)+", "  parameters: {}\n", model.read_text())
    model.write_text(text.replace("1024", "128"))
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
