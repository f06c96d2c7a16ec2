"""What a LoRA reruns, counted on DVC itself: what it changes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.loras import ATTENTION, write_lora
from tests.tiers import full, long

from .conftest import Clone

pytestmark = pytest.mark.pipeline

# Two components, one of which no LoRA of the UNet may touch.
FLEET = """\
# @package _global_
# Two components; for tests.
defaults:
  - /target@targets.cpu: cpu
  - /precision@fleet.cpu: fp32
fleet:
  cpu: {only: [text_encoder, unet]}
measure: [cpu]
"""
MEASURED = {"validate@cpu", "benchmark@cpu", "generate@cpu", "report"}
UNET = {"export@unet-fp32", "simplify@unet-fp32", "build@cpu-unet", "wrap@cpu-unet"}
FUSED = {"check_conf", "download", "reference", "pack@cpu", *UNET, *MEASURED}
WASH = "model.loras=[{file: wash.safetensors, weight: 0.8}]"


def weights(clone: Clone, network: str = "unet") -> bytes:
    (path,) = (clone.path / "artifacts/weights" / network).glob("*.safetensors")
    return path.read_bytes()


def manifest(clone: Clone, folder: str) -> dict:
    return json.loads((clone.path / "artifacts" / folder / "manifest.json").read_text())


@pytest.fixture
def clone(fresh: Clone, tiny_weights: Path) -> Clone:
    """A clone in which nothing has run, with a LoRA that no config names yet."""
    (fresh.path / "conf/fleet/small.yaml").write_text(FLEET)
    fresh.compose()
    write_lora(fresh.path / "loras/wash.safetensors", tiny_weights, seed=1)
    return fresh


# Four minutes, which CI has not: there a LoRA goes through the DAG with stripped engines.
@full
def test_a_lora_reruns_what_it_changes_and_going_back_restores(
    clone: Clone, tiny_weights: Path
) -> None:
    clone.repro()
    plain = weights(clone)
    text_encoder = manifest(clone, "weights/text_encoder")
    clone.compose(WASH)
    with_wash = clone.repro()
    assert with_wash.built == FUSED
    assert "wash.safetensors × 0.8 changed the layers: 56 of unet" in with_wash.output
    assert weights(clone) != plain
    assert manifest(clone, "weights/text_encoder") == text_encoder
    (entry,) = manifest(clone, "bundles/cpu/unet")["loras"]
    assert (entry["file"], entry["weight"], entry["layers"]) == ("wash.safetensors", 0.8, 56)
    assert manifest(clone, "bundles/cpu/text_encoder")["loras"] == []
    assert manifest(clone, "bundles/cpu/pipeline")["loras"] == {"unet": [entry]}
    page = (clone.path / "artifacts/report/index.html").read_text()
    assert "wash.safetensors" in page
    assert entry["sha256"] in page

    # A file that is not in use costs one run of `download`, whose weights are as before, and of
    # `report`, which shows how long that took.
    other = clone.path / "loras/other.safetensors"
    other.write_bytes(b"not in use")
    assert clone.repro().built == {"download", "report"}
    other.unlink()

    # The file's bytes count, not its name, and without a new composition.
    wash = clone.path / "loras/wash.safetensors"
    kept, fused = wash.read_bytes(), weights(clone)
    write_lora(wash, tiny_weights, seed=2)
    assert clone.repro("download").built == {"download"}
    assert weights(clone) != fused

    wash.write_bytes(kept)
    clone.compose()
    back = clone.repro()
    assert back.built == set()
    assert FUSED - {"check_conf"} <= back.restored
    assert weights(clone) == plain


@long
def test_one_lora_after_another_leaves_none_of_the_first(
    clone: Clone, tiny_weights: Path, tmp_path: Path
) -> None:
    both = {"unet": ATTENTION, "text_encoder": ATTENTION}
    write_lora(clone.path / "loras/wash.safetensors", tiny_weights, both, seed=3, kohya=True)
    alone = clone.copy(tmp_path / "alone")
    clone.compose("model.loras=[{file: wash.safetensors, weight: 1}]")
    clone.repro("download")
    assert manifest(clone, "weights/text_encoder")["loras"][0]["layers"] == 8
    clone.compose(WASH)
    clone.repro("download")
    alone.compose(WASH)
    alone.repro("download")
    for network in ("unet", "text_encoder"):
        assert weights(clone, network) == weights(alone, network)
        assert manifest(clone, f"weights/{network}") == manifest(alone, f"weights/{network}")


@full
def test_weights_are_swept_with_the_file_that_dvc_keeps(clone: Clone) -> None:
    clone.run("dvc", "add", "loras/wash.safetensors")
    text = (clone.path / "conf/lora/none.yaml").read_text()
    listed = text.replace("loras: []", "loras: [{file: wash.safetensors, weight: 1}]")
    (clone.path / "conf/lora/wash.yaml").write_text(listed)
    clone.compose()
    clone.commit("wash")
    sweep = ("-S", "lora=wash", "-S", "model.loras.0.weight=0.2,0.5")
    clone.run("dvc", "exp", "run", "--queue", *sweep, "download")
    outcome = clone.run("dvc", "exp", "run", "--run-all")
    table = json.loads(clone.run("dvc", "exp", "show", "--json").output)
    (base,) = [row for row in table if row["rev"] != "workspace"]
    found = {}
    for experiment in base["experiments"]:
        data = experiment["revs"][0]["data"]
        (lora,) = data["params"]["params.yaml"]["data"]["model"]["loras"]
        found[lora["weight"]] = data["outs"]["artifacts/weights"]["hash"]
    assert set(found) == {0.2, 0.5}, outcome.output
    assert found[0.2] != found[0.5]


def test_a_lora_that_cannot_be_fused_stops_before_the_download(clone: Clone) -> None:
    clone.compose("model.loras=[{file: missing.safetensors, weight: 1}]")
    outcome = clone.repro(check=False)
    assert outcome.status != 0
    assert "the LoRA loras/missing.safetensors does not exist" in outcome.output
    assert "found:    ink.safetensors, wash.safetensors" in outcome.output
    assert "random weights of tiny" not in outcome.output
    clone.compose("model.loras=[{file: wash.safetensors, weight: 0}]")
    outcome = clone.repro(check=False)
    assert outcome.built == {"check_conf"}
    assert "model.loras.0.weight: 0 changes nothing" in outcome.output
