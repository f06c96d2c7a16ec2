"""Of the targets for the same hardware, the fastest engines that passed are chosen and loaded."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_engines import load_pipeline, manifests
from diffusion_engines.bench.results import read_benchmark
from diffusion_engines.errors import ConfigError, FingerprintError, GateError, IntegrityError
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Bundle
from diffusion_engines.parity.results import read_validation
from diffusion_engines.parity.validation import judge
from diffusion_engines.release.alternatives import Measurements, choose_engines
from diffusion_engines.release.chosen import Chosen, read_chosen, write_chosen
from tests.reports import NOT_SCORED, PYTORCH, write_latencies, write_parity

COMPONENTS = dict.fromkeys(FAMILY.components, "fp32")


@pytest.fixture
def workspace(tiny_bundles: Path, tmp_path: Path) -> Workspace:
    """A clone with `cpu` and two alternatives, of which `quick` is twice as fast."""
    made = Workspace(tmp_path)
    for target in ("cpu", "quick", "equal"):
        shutil.copytree(tiny_bundles, made.bundles(target))
        for name in COMPONENTS:
            manifest = manifests.read(made.bundle(target, name), Bundle)
            named = dataclasses.replace(manifest, target=target, name=f"{target}-{name}")
            manifests.write(made.bundle(target, name), named)
        write_parity(made, target, COMPONENTS, 1e-6, NOT_SCORED)
    write_latencies(made, "cpu", COMPONENTS, [], {"fp32": PYTORCH})
    write_latencies(made, "quick", COMPONENTS, [], {"fp32": PYTORCH}, beside="cpu", seconds=0.012)
    write_latencies(made, "equal", COMPONENTS, [], {"fp32": PYTORCH}, beside="cpu")
    return made


def choice(workspace: Workspace, *alternatives: str) -> Chosen:
    def measured(target: str) -> Measurements:
        return Measurements(
            "onnxruntime",
            "cpu",
            read_validation(workspace.validation(target)),
            read_benchmark(workspace.benchmark(target)),
        )

    found = choose_engines("cpu", measured("cpu"), {name: measured(name) for name in alternatives})
    workspace.alternatives("cpu").mkdir(parents=True, exist_ok=True)
    write_chosen(found, workspace.alternatives("cpu"))
    assert read_chosen(workspace.alternatives("cpu")) == found
    return found


def test_what_is_faster_beyond_its_noise_is_chosen(workspace: Workspace) -> None:
    found = choice(workspace, "equal", "quick")

    assert {name: pick.target for name, pick in found.components.items()} == dict.fromkeys(
        COMPONENTS, "quick"
    )
    unet = found.components["unet"]
    assert unet.reason == "6 ms, cpu 12 ms in the same run: 2.00×"
    assert unet.milliseconds == {"equal": (12.0, 12.0), "quick": (6.0, 12.0)}
    assert [profile.target for profile in found.profiles] == ["cpu", "equal", "quick"]
    assert found.passed_over == {}


def test_without_a_faster_one_all_stays(workspace: Workspace) -> None:
    picks = choice(workspace, "equal").components.values()
    assert {(pick.target, pick.reason) for pick in picks} == {
        ("cpu", "no alternative is faster beyond the noise of the repeats")
    }


def test_a_component_without_an_alternative_stays(workspace: Workspace) -> None:
    write_latencies(
        workspace, "quick", {"unet": "fp32"}, [], {"fp32": PYTORCH}, beside="cpu", seconds=0.012
    )
    write_parity(workspace, "quick", {"unet": "fp32"}, 1e-6, NOT_SCORED)
    found = choice(workspace, "quick")
    assert found.components["vae_decoder"].target == "cpu"
    assert found.components["unet"].target == "quick"


def missed(workspace: Workspace) -> None:
    write_parity(workspace, "quick", COMPONENTS, 1e-3, NOT_SCORED)


def built_again(workspace: Workspace) -> None:
    manifest = manifests.read(workspace.bundle("quick", "unet"), Bundle)
    other = dataclasses.replace(manifest, layers={"Conv": 1})
    manifests.write(workspace.bundle("quick", "unet"), other)
    write_parity(workspace, "quick", COMPONENTS, 1e-6, NOT_SCORED)


def timed_beside_others(workspace: Workspace) -> None:
    write_latencies(
        workspace, "quick", COMPONENTS, [], {"fp32": PYTORCH}, beside="equal", seconds=0.012
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (missed, "quick missed"),
        (built_again, "the engines of quick are not those that were timed"),
        (timed_beside_others, "the engines of cpu are not those that were timed beside it"),
    ],
)
def test_what_is_not_proven_is_passed_over_with_the_reason(
    workspace: Workspace, change: Callable[[Workspace], None], reason: str
) -> None:
    change(workspace)
    found = choice(workspace, "equal", "quick")
    assert reason in found.passed_over["quick"]
    assert {pick.target for pick in found.components.values()} == {"cpu"}


def test_a_miss_of_an_alternative_is_recorded_and_no_failure(workspace: Workspace) -> None:
    where = workspace.validation("quick")
    assert judge(read_validation(where), None, where) == "  within tolerance"
    missed(workspace)
    result = read_validation(where)
    assert "as an alternative to cpu they are passed over" in judge(result, "cpu", where)
    with pytest.raises(GateError, match="the engines of quick miss"):
        judge(result, None, where)


def test_a_pipeline_takes_what_was_chosen_or_what_is_asked_for(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    write_latencies(
        workspace, "quick", {"unet": "fp32"}, [], {"fp32": PYTORCH}, beside="cpu", seconds=0.012
    )
    write_parity(workspace, "quick", {"unet": "fp32"}, 1e-6, NOT_SCORED)
    choice(workspace, "quick")

    def engine_of(pipeline: object, network: str) -> str:
        return str(getattr(pipeline, network).engine.manifest.name)

    with caplog.at_level(logging.INFO, "diffusion_engines.release"):
        chosen = load_pipeline(workspace.artifacts)
    assert "text_encoder cpu, unet quick, vae_decoder cpu" in caplog.text
    assert engine_of(chosen, "unet") == "quick-unet"
    assert engine_of(chosen, "text_encoder") == "cpu-text_encoder"
    assert engine_of(load_pipeline(workspace.artifacts, target="equal"), "unet") == "equal-unet"

    with pytest.raises(FingerprintError, match="it runs on cpu, not on cuda"):
        load_pipeline(workspace.artifacts, "cuda")
    with pytest.raises(ConfigError, match="no target nowhere"):
        load_pipeline(workspace.artifacts, target="nowhere")
    built_again(workspace)
    with pytest.raises(IntegrityError, match="is not what the stage `choose` compared"):
        load_pipeline(workspace.artifacts)
    shutil.rmtree(workspace.artifacts / "alternatives")
    with pytest.raises(FingerprintError, match="this fleet has no measured alternatives"):
        load_pipeline(workspace.artifacts)
