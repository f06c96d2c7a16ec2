"""The doctor: what ends one check ends no other, and its page says what this machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_engines import manifests
from diffusion_engines.backends import gpus
from diffusion_engines.backends.gpus import Gpu
from diffusion_engines.doctor import engines, machine, toy
from diffusion_engines.doctor.checks import CHECKS
from diffusion_engines.doctor.examination import JSON, PAGE, examine
from diffusion_engines.doctor.findings import Finding
from diffusion_engines.doctor.running import report, run_checks
from diffusion_engines.doctor.targets import write_builds
from diffusion_engines.errors import BuildError, GateError
from tests.conftest import ROOT
from tests.doubles import worker
from tests.doubles.launcher import install


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    folder = tmp_path_factory.mktemp("shared")
    checks = run_checks(worker.CHECKS, folder, worker=worker.__name__)
    return {check.name: finding for check, finding in checks}


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("good", "passed", "all is well"),
        (
            "crash",
            "failed",
            "its process ended by SIGSEGV (it crashed); the end of its log:\nloading",
        ),
        ("refuse", "failed", "no such layer\n  expected: a layer"),
        ("stumble", "failed", "ValueError: a library's own"),
        ("lacks", "missing", "no such | thing"),
        ("after", "missing", "needs: crash"),
        ("last", "passed", "shared"),
    ],
)
def test_a_check_ends_no_other(
    findings: dict[str, Finding], name: str, status: str, detail: str
) -> None:
    assert findings[name].status == status
    assert findings[name].detail.startswith(detail)


def test_a_check_that_hangs_is_ended(tmp_path: Path) -> None:
    ((_, finding),) = run_checks([worker.SLOW], tmp_path, limit=1.0, worker=worker.__name__)
    assert finding.status == "failed"
    assert "had not ended after 1 s" in finding.detail


def test_the_page_and_the_json_say_the_same(findings: dict[str, Finding]) -> None:
    pairs = [(check, findings[check.name]) for check in worker.CHECKS]
    page, content = report(pairs, {"date": "today"})
    assert "- 2 passed, 3 failed, 2 missing" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(pairs)
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert "  expected: a layer" in page  # the whole message of what failed
    assert "number: 1" in page
    written = json.loads(content)["checks"]
    assert [(c["name"], c["status"]) for c in written] == [
        (check.name, finding.status) for check, finding in pairs
    ]


def test_every_check_builds_on_earlier_ones() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for index, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:index]), check.name


def test_the_toy_network_is_compared_at_two_sizes() -> None:
    assert toy.compare(toy.network().half(), "cpu") < toy.TOLERANCE
    first: list[torch.Tensor] = []

    def stale(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """As a module that answers a second call of a size with what it has from the first."""
        with torch.no_grad():
            first.append(toy.network()(latents.float(), timestep))
        return next(image for image in first if image.shape == latents.shape)

    with pytest.raises(GateError, match=f"at batch {toy.BATCHES[0]}"):
        toy.compare(stale, "cpu")
    assert len(first) == 3  # both sizes passed once


@pytest.mark.parametrize("forgets", [False, True])
def test_a_refit_has_to_bring_the_first_numbers_back(forgets: bool) -> None:
    """One that leaves anything of the second fine-tune is found, however little it is."""
    given: list[int] = []

    def refitted(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            image = toy.network(given[-1])(latents.float(), timestep)
        return image * (1 + 1e-6) if forgets and len(given) == 3 else image

    if not forgets:
        assert toy.compare_fine_tunes(refitted, given.append, "cpu")["second"] < toy.TOLERANCE
        assert given == [0, 1, 0]
        return
    with pytest.raises(GateError, match="after the weights of another fine-tune"):
        toy.compare_fine_tunes(refitted, given.append, "cpu")


@pytest.fixture
def a10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of checks on a machine with doubles of an A10, its driver and trtexec 10.16."""
    monkeypatch.setattr(gpus, "find_gpu", lambda: Gpu("NVIDIA A10", "8.6"))
    install(tmp_path / "bin", "trtexec")
    install(tmp_path / "bin", "nvidia-smi", "print('575.57.08')\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRTEXEC_DOUBLE_RELEASE", "10.16")
    work = tmp_path / "work"
    work.mkdir()
    write_builds(ROOT / "conf", work)
    return work


def test_trtexec_is_asked_for_the_options_that_a_build_passes(a10: Path) -> None:
    found = machine.check_trtexec(a10)
    assert found.status == "passed"
    assert "[TensorRT v101600]" in found.facts["banner"]
    assert {"--onnx", "--stronglyTyped", "--timingCacheFile"} <= set(found.facts["options"])
    assert machine.check_driver(a10).facts == {"branch": "575"}
    helpless = "print('[TensorRT v101600]\\n  --onnx=<file>\\n  --saveEngine')\n"
    install(a10.parent / "bin", "trtexec", helpless)
    with pytest.raises(BuildError, match="lacks options that a build would pass") as raised:
        machine.check_trtexec(a10)
    assert "--skipInference" in str(raised.value)
    assert "--saveEngine," not in raised.value.found


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    assert examine(ROOT, folder) == []
    return folder


@pytest.mark.long
def test_this_machine_passes_for_what_it_has(examined: Path) -> None:
    found = {c["name"]: c for c in json.loads((examined / JSON).read_text())["checks"]}
    assert list(found) == [check.name for check in CHECKS]
    for name in ("libraries", "export", "onnxruntime"):
        assert found[name]["status"] == "passed"
    assert 0 < found["onnxruntime"]["facts"]["rel_l2"] < toy.TOLERANCE
    has_rtx = found["tensorrt_rtx"]["status"] == "passed"
    assert found["rtx_build"]["status"] == ("passed" if has_rtx else "missing")
    has_gpu = torch.cuda.is_available()
    assert found["gpu"]["status"] == ("passed" if has_gpu else "missing")
    if not has_gpu:
        assert found["trtexec_build"]["detail"].startswith("needs: ")
    page = (examined / PAGE).read_text()
    assert all(f"| {check.title} | {found[check.name]['status']} |" in page for check in CHECKS)


@pytest.mark.long
def test_the_double_of_trtexec_goes_through_its_build(
    examined: Path, a10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*toy.GRAPHS, toy.STRUCTURE):
        (a10 / name).symlink_to(examined / "work" / name)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    found = engines.check_trtexec_build(a10)
    assert (found.status, found.detail) == ("passed", "trtexec 10.16.0")
    assert found.facts["fingerprint"]["driver"] == "575"
    layer: Any = found.facts["first_layers"][0]
    assert layer["Outputs"][0]["Format/Datatype"] == "Half"
    bundle = manifests.read(a10 / "trtexec" / engines.BUNDLE, manifests.Bundle)
    assert bundle.engine == "engine.plan"
    # Without weights: one plan, and those of each fine-tune beside it.
    assert engines.check_tensorrt_stripped(a10).status == "passed"
    bundles = [
        manifests.read(a10 / "stripped" / name, manifests.Bundle)
        for name in (engines.BUNDLE, engines.TUNED)
    ]
    assert [found.onnx.seed for found in bundles] == [0, 1]
    first, second = (found.files for found in bundles)
    assert {name for name in first if first[name] != second[name]} == {"model.onnx.data"}
