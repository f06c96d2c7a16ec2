"""Two states of a fleet side by side: what is more than noise, and what is not."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from diffusion_engines import manifests
from diffusion_engines.bench.results import read_benchmark
from diffusion_engines.cli import main
from diffusion_engines.comparison.changes import Change, changes, differences, regressions
from diffusion_engines.comparison.states import WORKSPACE, state_of
from diffusion_engines.config import ENGINES
from diffusion_engines.errors import ConfigError
from diffusion_engines.layout import Workspace
from diffusion_engines.results import write_result
from tests.reports import make_fleet, picture

# Of pygtrie, which DVC calls so.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

ENGINES_OF = {"cpu-text_encoder": "fp32", "cpu-unet": "fp32", "rtx-unet": "fp16"}
BOTH = [("cpu", "cpu"), ("rtx", "rtx")]


def make(root: Path, rel_l2: float = 1e-5) -> Workspace:
    made = make_fleet(root, ENGINES_OF, rel_l2=rel_l2)
    names = [name.split("-", 1) for name in ENGINES_OF]
    engines = {
        f"{target}-{component}": {"target": target, "component": component}
        for target, component in names
    }
    (root / "params.yaml").write_text(yaml.safe_dump({"engines": engines, "measured": {"cpu": {}}}))
    return made.workspace


def with_times(workspace: Workspace, engine: float, baseline: float, repeats: int = 10) -> None:
    """Give the target cpu repeats around these milliseconds, with two percent of noise."""
    found = read_benchmark(workspace.benchmark("cpu"))
    noise = random.Random(f"{engine} {baseline} {workspace.root.name}")
    samples = {
        runner: {
            phase: tuple(around * (1 + 0.02 * noise.uniform(-1, 1)) for _ in range(repeats))
            for phase in found.samples[runner]
        }
        for runner, around in ((ENGINES, engine), (found.baseline, baseline))
    }
    path = workspace.benchmark("cpu") / "benchmark.json"
    write_result(path, dataclasses.replace(found, samples=samples), version=2)


@pytest.fixture
def two(tmp_path: Path) -> Callable[..., list[Change]]:
    """Compares an engine of 10 ms beside a baseline of 20 with other times."""

    def compare(engine: float, baseline: float, repeats: int = 10) -> list[Change]:
        with_times(make(tmp_path / "a"), 10.0, 20.0, repeats)
        with_times(make(tmp_path / "b"), engine, baseline, repeats)
        with state_of(tmp_path / "a", WORKSPACE) as a, state_of(tmp_path / "b", WORKSPACE) as b:
            return changes(a, b, BOTH)

    return compare


def verdict(found: list[Change], what: str) -> str:
    (one,) = [change for change in found if change.what == what]
    return one.verdict


@pytest.mark.parametrize(
    ("engine", "baseline", "repeats", "expected"),
    [
        (10.0, 20.0, 10, "same"),
        (10.5, 20.0, 10, "worse"),
        (9.5, 20.0, 10, "better"),
        (12.0, 24.0, 10, "same"),  # the machine was slower
        (10.0, 16.0, 10, "same"),  # the baseline became faster
        (11.5, 20.0, 5, "worse"),
        (20.0, 20.0, 3, "unknown"),  # three repeats are above three others now and then
    ],
    ids=["noise", "slower", "faster", "a slower machine", "a faster PyTorch", "five", "three"],
)
def test_the_repeats_of_both_runs_decide(
    two: Callable[..., list[Change]], engine: float, baseline: float, repeats: int, expected: str
) -> None:
    found = two(engine, baseline, repeats)
    assert {verdict(found, what) for what in ("picture", "call", "encoding")} == {expected}
    assert bool(regressions(found)) == (expected == "worse")


def test_sizes_parity_and_what_changed_around_them(tmp_path: Path) -> None:
    make(tmp_path / "a")
    other = make(tmp_path / "b", rel_l2=1.0)  # more than is allowed
    folder = other.engine("rtx", "unet")
    (folder / "engine.onnx").write_bytes(bytes(9000))
    old = manifests.read(folder, manifests.Engine, verify=False)
    fingerprint = {**old.fingerprint, "tensorrt": "11.0.0"}
    manifests.write(folder, dataclasses.replace(old, fingerprint=fingerprint, precision="fp8"))
    with state_of(tmp_path / "a", WORKSPACE) as a, state_of(tmp_path / "b", WORKSPACE) as b:
        found = {(c.target, c.component, c.what): c for c in changes(a, b, BOTH)}
        facts = differences(a, b, BOTH)
        assert differences(a, a, BOTH) == []
        assert {c.verdict for c in changes(a, a, BOTH)} <= {"same", "unknown"}
    assert found["rtx", "unet", "size"].before == pytest.approx(0.0035)
    assert found["rtx", "unet", "size"].after == pytest.approx(0.0115)
    assert found["cpu", "unet", "size"].verdict == "same"
    assert found["cpu", "unet", "relative L2"].verdict == "worse"
    assert facts == ["rtx: precision fp16 → fp8", "rtx: tensorrt none → 11.0.0"]


def test_an_engine_that_is_gone_is_a_regression(tmp_path: Path) -> None:
    make(tmp_path / "a")
    other = make(tmp_path / "b")
    (other.engine("cpu", "unet") / "manifest.json").unlink()
    with state_of(tmp_path / "a", WORKSPACE) as a, state_of(tmp_path / "b", WORKSPACE) as b:
        (gone,) = regressions(changes(a, b, BOTH))
    assert (gone.target, gone.component, gone.after) == ("cpu", "unet", None)


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit whose results are in DVC's cache, and a slower working copy."""
    from dvc.repo import Repo

    root = tmp_path / "repository"
    workspace = make(root)
    with_times(workspace, 10.0, 20.0)
    run = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*run, "init", "-q"], cwd=root, check=True)
    with Repo.init(str(root)) as repo:
        repo.add(
            [str(workspace.artifacts / name) for name in ("engines", "benchmark", "validation")]
        )
    subprocess.run([*run, "add", "params.yaml", "artifacts", ".dvc"], cwd=root, check=True)
    subprocess.run([*run, "commit", "-qm", "first"], cwd=root, check=True)
    with_times(workspace, 13.0, 20.0)
    picture(200).save(workspace.validation("cpu") / "image-00.png")
    monkeypatch.chdir(root)
    return root


def test_a_commit_and_the_working_copy(history: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["diff", "--fail-on", "regression"])
    assert ended.value.code == "worse: cpu picture, cpu call, cpu encoding, cpu decoding"
    shown = capsys.readouterr().out
    assert "the same settings, libraries, weights and machines" in shown
    assert re.search(r"cpu +picture +24 ms +24 ms +1\.000 +worse", shown)
    page = (history / "artifacts/diff/index.html").read_text()
    assert page.count("data:image/png") == 6
    assert "difference × 2; the largest is 100 of 255" in page
    assert "http" not in re.sub(r"data:[^\"]+", "", page)

    main(["diff", "HEAD", "HEAD", "--fail-on", "regression"])
    main(["diff", "HEAD:cpu", "HEAD:rtx"])
    assert re.search(r"rtx +unet +size", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["no-such-branch"], "there is no revision no-such-branch"),
        (["HEAD:a10", "HEAD:cpu"], "HEAD has no engines of a10"),
    ],
)
def test_what_is_not_there_is_named(history: Path, given: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["diff", *given])


def test_a_working_copy_without_engines(tmp_path: Path) -> None:
    make(tmp_path)
    for manifest in (tmp_path / "artifacts/engines").rglob("manifest.json"):
        manifest.unlink()
    with (
        pytest.raises(ConfigError, match="has no engines to compare"),
        state_of(tmp_path, WORKSPACE),
    ):
        pass
