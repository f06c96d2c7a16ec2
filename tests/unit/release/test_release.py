"""A release has what is proven, and each machine takes its own of it."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusion_engines import load_pipeline, manifests
from diffusion_engines.errors import ConfigError, FingerprintError, IntegrityError
from diffusion_engines.files import read_json
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Bundle
from diffusion_engines.release import choosing
from diffusion_engines.release.choosing import consider
from diffusion_engines.release.listing import print_profiles
from diffusion_engines.release.profiles import RECEIPT, RELEASE, read_release
from diffusion_engines.release.publishing import publish
from tests.reports import NOT_SCORED, write_parity
from tests.unit.release.conftest import COMPONENTS, HERE, as_of, measure


def of_another_version(folder: Path) -> None:
    """Make engines ones of an ONNX Runtime that is not the one here."""
    for name in COMPONENTS:
        manifest = manifests.read(folder / name, Bundle)
        fingerprint = {**manifest.fingerprint, "onnxruntime": "1.0.0"}
        manifests.write(folder / name, dataclasses.replace(manifest, fingerprint=fingerprint))


def paint(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 128, "width": 128}
    return np.asarray(pipeline("a lemon", generator=generator, **settings).images)


def test_what_is_proven_is_served_with_its_receipt(
    workspace: Workspace, tiny_bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, refused = publish(workspace, ["cpu"], tmp_path / "release")

    assert refused == {}
    assert read_release(tmp_path / "release") == release
    receipt = (tmp_path / "release/cpu" / RECEIPT).read_text()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=workspace.root, capture_output=True, text=True, check=True
    )
    weights = manifests.read(tiny_bundles / "unet", Bundle).onnx.weights
    for part in (commit.stdout.strip(), str(weights), '"rel_l2": 1e-06', '"picture_ms": 24.0'):
        assert part in receipt
    assert (paint(load_pipeline(tmp_path / "release")) == paint(load_pipeline(tiny_bundles))).all()
    print_profiles(tmp_path / "release")
    shown = capsys.readouterr().out
    for part in ("cpu", "onnxruntime", "24 ms, 3 steps", HERE["cpu"], "can be loaded"):
        assert part in shown


def test_a_receipt_has_the_hashes_of_the_graph(workspace: Workspace, tmp_path: Path) -> None:
    folder = workspace.bundle("cpu", "unet")
    manifest = manifests.read(folder, Bundle)
    graph = dataclasses.replace(manifest.onnx, files={"model.onnx": manifests.File(3, "c" * 64)})
    manifests.write(folder, dataclasses.replace(manifest, onnx=graph))
    measure(workspace, "cpu")
    publish(workspace, ["cpu"], tmp_path / "release")
    receipt = read_json(tmp_path / "release/cpu" / RECEIPT)
    assert receipt["engines"]["unet"]["graph_files"] == {"model.onnx": "c" * 64}


def no_validation(workspace: Workspace) -> None:
    shutil.rmtree(workspace.validation("cpu"))


def no_benchmark(workspace: Workspace) -> None:
    shutil.rmtree(workspace.benchmark("cpu"))


def missed(workspace: Workspace) -> None:
    write_parity(workspace, "cpu", COMPONENTS, 1e-3, NOT_SCORED)


def built_again(workspace: Workspace) -> None:
    of_another_version(workspace.bundles("cpu"))


def validated_again(workspace: Workspace) -> None:
    built_again(workspace)
    write_parity(workspace, "cpu", COMPONENTS, 1e-6, NOT_SCORED)


def damaged(workspace: Workspace) -> None:
    (workspace.bundle("cpu", "unet") / "engine.onnx").write_bytes(b"damaged")


def without_decoder(workspace: Workspace) -> None:
    shutil.rmtree(workspace.bundle("cpu", "vae_decoder"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_validation, "validation.json does not exist"),
        (no_benchmark, "benchmark.json does not exist"),
        (missed, "tolerance(s): expected none, found text_encoder (fp32)"),
        (built_again, "not those that were validated"),
        (validated_again, "not those that were timed"),
        (damaged, "engine.onnx"),
        (without_decoder, "has no engine of vae_decoder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_proven_is_refused(
    workspace: Workspace, tmp_path: Path, change: Callable[[Workspace], None], reason: str
) -> None:
    publish(workspace, ["cpu"], tmp_path / "release")
    before = (tmp_path / "release" / RELEASE).read_bytes()
    change(workspace)
    with pytest.raises(IntegrityError) as caught:
        publish(workspace, ["cpu"], tmp_path / "release")
    assert "nothing can be published" in str(caught.value)
    assert reason in str(caught.value)
    assert (tmp_path / "release" / RELEASE).read_bytes() == before


def test_the_rest_of_a_fleet_is_published_without_what_is_not_proven(
    workspace: Workspace, tmp_path: Path
) -> None:
    release, refused = publish(workspace, ["a10", "cpu"], tmp_path / "release")
    assert [profile.target for profile in release.profiles] == ["cpu"]
    assert "does not exist" in refused["a10"]
    assert not (tmp_path / "release/a10").exists()


def test_equal_engines_make_an_equal_release(workspace: Workspace, tmp_path: Path) -> None:
    publish(workspace, ["cpu"], tmp_path / "release")
    publish(workspace, ["cpu"], tmp_path / "again")
    for name in (RELEASE, f"cpu/{RECEIPT}"):
        assert (tmp_path / "release" / name).read_bytes() == (
            tmp_path / "again" / name
        ).read_bytes()


@pytest.mark.parametrize(
    "name", [f"cpu/{RECEIPT}", "cpu/unet/manifest.json", "cpu/unet/engine.onnx"]
)
def test_an_altered_release_is_refused(workspace: Workspace, tmp_path: Path, name: str) -> None:
    publish(workspace, ["cpu"], tmp_path / "release")
    path = tmp_path / "release" / name
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(IntegrityError, match=path.name):
        load_pipeline(tmp_path / "release")


@pytest.fixture
def fleet(workspace: Workspace, tmp_path: Path) -> Path:
    """A release of four: for this machine and lost, for other machines, a slow and a fast one."""
    for target in ("fast", "here", "other"):
        shutil.copytree(workspace.bundles("cpu"), workspace.bundles(target))
    of_another_version(workspace.bundles("here"))
    for target in ("fast", "here", "other"):
        measure(workspace, target)
    for target in ("cpu", "fast", "other"):
        as_of(workspace, target, HERE | {"cpu": "Testor 9000"})
    faster = workspace.benchmark("fast") / "benchmark.json"
    faster.write_text(faster.read_text().replace("24.0", "12.0"))
    publish(workspace, ["cpu", "fast", "here", "other"], tmp_path / "release")
    return tmp_path / "release"


def test_the_own_profile_comes_first_and_then_the_fastest(fleet: Path) -> None:
    order = [one.profile.target for one in consider(fleet)]
    assert order == ["here", "fast", "cpu", "other"]
    there = [one.profile.target for one in consider(fleet, machine=HERE | {"cpu": "Testor 9000"})]
    assert there == ["fast", "cpu", "other", "here"]
    reasons = {one.profile.target: one.reason for one in consider(fleet)}
    assert "1.0.0" in str(reasons["here"])
    assert reasons["fast"] is None
    assert "it runs on cpu" in str(consider(fleet, "cuda")[0].reason)


def test_what_is_lost_is_no_silent_change(
    fleet: Path, tiny_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choosing.FALLBACKS.clear()
    with pytest.raises(FingerprintError) as caught:
        load_pipeline(fleet)
    for part in ("expected: here", "here: ", "1.0.0", "fast: generic", 'fallback="generic"'):
        assert part in str(caught.value)
    assert not choosing.FALLBACKS

    with caplog.at_level(logging.WARNING, "diffusion_engines"):
        pictures = paint(load_pipeline(fleet, fallback="generic"))
    assert choosing.FALLBACKS == {"fast": 1}
    assert "the profile fast is taken in place of engines for this machine (here: " in caplog.text

    with pytest.raises(ConfigError, match="needs the weights"):
        load_pipeline(fleet, fallback="pytorch")
    own = load_pipeline(fleet, fallback="pytorch", weights=tiny_weights)
    assert type(own) is StableDiffusionPipeline
    assert choosing.FALLBACKS == {"fast": 1, "pytorch": 2}
    assert np.abs(paint(own) - pictures).max() < 1e-3


def test_pytorch_takes_the_weights_that_the_release_was_made_from(
    fleet: Path, weights_copy: Path
) -> None:
    config = weights_copy / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    manifest = manifests.read(weights_copy / "unet", manifests.Weights, verify=False)
    manifests.write(weights_copy / "unet", manifest)
    with pytest.raises(IntegrityError, match="other weights than"):
        load_pipeline(fleet, fallback="pytorch", weights=weights_copy)
