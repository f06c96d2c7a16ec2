"""A plan against what `dvc repro` then does, for each kind of change: DVC runs, stages pretend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_engines import cpu
from diffusion_engines.backends.tensorrt_rtx import fingerprint as rtx_fingerprint
from diffusion_engines.backends.tensorrt_rtx.building import library
from diffusion_engines.cli import main
from diffusion_engines.compose import compose_params
from diffusion_engines.plan.outcomes import Outcome
from diffusion_engines.plan.planning import Plan, plan_run, why_stages_run
from tests.pipeline.conftest import ROOT, Clone, make_clone
from tests.pipeline.pretence import SECONDS, compose_in, install_python, reproduce
from tests.tiers import long, long_but

pytestmark = [
    pytest.mark.pipeline,
    # Of pygtrie, in DVC's own code.
    pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning"),
]

CHECKS = {"probe@cpu", "probe@rtx", "probe_machine@cpu"}
MEASURED = {"benchmark@cpu", "generate@cpu", "validate@cpu"}
CPU = {"build@cpu-unet", "wrap@cpu-unet", *MEASURED}
RTX = {"build@rtx-unet", "wrap@rtx-unet"}
EXPORTS = {"export@unet-fp32", "export@unet-fp16"}
SIMPLIFIED = {"simplify@unet-fp32", "simplify@unet-fp16"}
PACKS = {"pack@cpu", "pack@rtx"}
GRAPHS = {*EXPORTS, *SIMPLIFIED}
ALL = {"check_conf", "download", "reference", *GRAPHS, *CPU, *RTX, *PACKS, "report"}


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which everything has pretended to run, committed; not to be changed."""
    folder = tmp_path_factory.mktemp("pretended")
    install_python(folder / "bin")
    clone = make_clone(folder / "clone")
    for heavy in ("docs", "models/lemon"):
        shutil.rmtree(clone.path / heavy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone.path)
        assert reproduce(clone.path).ran == ALL | CHECKS
    clone.commit("built")
    return clone


@pytest.fixture
def clones(
    pretended: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Clone]]:
    """Copies of it by name, each with a cache of its own; the last one is the current folder."""
    (tmp_path / "bin").symlink_to(pretended.path.parent / "bin")

    def copy(name: str) -> Clone:
        clone = pretended.copy(tmp_path / name)
        monkeypatch.chdir(clone.path)
        compose_in(clone.path)
        return clone

    yield copy
    compose_in(ROOT)


def add(clone: Clone, file: str, text: str) -> None:
    path = clone.path / file
    path.write_text(path.read_text() + text)


def stages(plan: Plan, outcome: Outcome) -> set[str]:
    return {stage.stage for stage, _ in plan.stages if stage.outcome is outcome}


def reasons(plan: Plan, stage: str) -> list[str]:
    (found,) = [planned.reasons for planned, _ in plan.stages if planned.stage == stage]
    return [reason.text for reason in found]


@dataclass(frozen=True)
class Case:
    """A change, and what comes of it.

    ``change`` takes the clone's folder and returns Hydra's overrides; ``reason`` is one that some
    stage that runs or is restored has.
    """

    name: str
    change: Callable[[Path], list[str]]
    reason: str
    runs: set[str]
    may: set[str]
    restored: frozenset[str] = frozenset()


def override(*given: str) -> Callable[[Path], list[str]]:
    return lambda root: [*given]


def append(file: str, text: str = "# more\n") -> Callable[[Path], list[str]]:
    def change(root: Path) -> list[str]:
        path = root / file
        path.write_text((path.read_text() if path.exists() else "") + text)
        return []

    return change


def remove(path: str) -> Callable[[Path], list[str]]:
    def change(root: Path) -> list[str]:
        if (root / path).is_file():
            (root / path).unlink()
        else:
            shutil.rmtree(root / path)
        return []

    return change


def lose_from_cache(path: str) -> Callable[[Path], list[str]]:
    """Delete what the cache has of an output, but not the output."""

    def change(root: Path) -> list[str]:
        locked = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
        (value,) = [o["md5"] for s in locked.values() for o in s["outs"] if o["path"] == path]
        (root / ".dvc/cache/files/md5" / value[:2] / value[2:]).unlink()
        return []

    return change


def join_fleet(root: Path, target: str = "rtx40") -> list[str]:
    path = root / "conf/fleet/small.yaml"
    added = f"  - /target@targets.ada: {target}\n  - /precision@fleet.ada: fp16\n"
    path.write_text(
        path.read_text().replace("fleet:\n", f"{added}fleet:\n  ada: {{only: [unet]}}\n")
    )
    return []


def other_command(root: Path) -> list[str]:
    path = root / "dvc.yaml"
    path.write_text(path.read_text().replace("stages/pack.py +target", "stages/pack.py  +target"))
    return []


CASES = [
    Case(
        "weights",
        override("model.seed=1"),
        "model.seed: 0 → 1",
        {"check_conf", "download", "report"},
        {"reference", *GRAPHS, *CPU, *RTX, *PACKS},
    ),
    Case(
        "LoRA",
        append("loras/other.safetensors"),
        "loras: other.safetensors is new",
        {"download"},
        ALL - {"check_conf", "download"},
    ),
    Case(
        "opset",
        override("export.opset=20"),
        "export.opset: 18 → 20",
        {"check_conf", *EXPORTS},
        {*SIMPLIFIED, *CPU, *RTX, "report"},
    ),
    Case(
        "patch list",
        override("export.patches=[explicit_attention]"),
        "export.patches: [] → ['explicit_attention']",
        {"check_conf", *EXPORTS},
        {*SIMPLIFIED, *CPU, *RTX, "report"},
    ),
    Case(
        "one target's flag",
        override("targets.rtx.build.max_aux_streams=0"),
        "targets.rtx.build.max_aux_streams: null → 0",
        {"check_conf", "build@rtx-unet"},
        {"wrap@rtx-unet", "report"},
    ),
    Case(
        "fleet membership",
        join_fleet,
        "dvc.lock has no such stage yet",
        {"check_conf", "build@ada-unet", "wrap@ada-unet", "pack@ada", "report"},
        set(),
    ),
    Case(
        "tolerance",
        override("validate.components.unet.fp32.rel_l2=1.0e-3"),
        "validate.components.unet.fp32.rel_l2: 0.0001 → 0.001",
        {"check_conf", "simplify@unet-fp32", "validate@cpu"},
        {*CPU - {"validate@cpu"}, "report"},
    ),
    Case(
        "benchmark settings",
        override("benchmark.repeats=3"),
        "benchmark.repeats: 1 → 3",
        {"check_conf", "benchmark@cpu"},
        {"report"},
    ),
    Case(
        "price",
        override("+prices.EPYC={per_hour: 1.0, currency: EUR, source: s, date: '2026-11-25'}"),
        "prices.EPYC",
        {"check_conf", "report"},
        set(),
    ),
    Case(
        "prompt",
        override("reference.prompts=[A lemon]"),
        "→ ['A lemon']",
        {"check_conf", "reference"},
        {*SIMPLIFIED, *CPU, *RTX, "report"},
    ),
    Case(
        "library module",
        append("src/diffusion_engines/weights/fuse.py"),
        "src/diffusion_engines/weights: fuse.py changed",
        {"download"},
        ALL - {"check_conf", "download"},
    ),
    Case(
        "stage script",
        append("stages/wrap.py"),
        "stages/wrap.py changed",
        {"wrap@cpu-unet", "wrap@rtx-unet"},
        {*MEASURED, "report"},
    ),
    Case(
        "stage's command",
        other_command,
        "its command in dvc.yaml changed",
        {*PACKS},
        {*MEASURED, "report"},
    ),
    Case(
        "deleted output",
        remove("artifacts/engines/cpu"),
        "artifacts/engines/cpu/unet is missing",
        set(),
        set(),
        frozenset({"build@cpu-unet"}),
    ),
    Case(
        "deleted cache object",
        lose_from_cache("artifacts/engines/cpu/unet"),
        "the cache has lost artifacts/engines/cpu/unet",
        {"build@cpu-unet"},
        {*CPU - {"build@cpu-unet"}, "report"},
    ),
    Case(
        "edited output",
        append("artifacts/onnx/unet-fp32/content"),
        "artifacts/onnx/unet-fp32 was edited: content changed",
        set(),
        set(),
        frozenset({"simplify@unet-fp32"}),
    ),
    Case(
        "new machine record",
        remove("artifacts/machines/cpu.json"),
        "cpu is timed anew, on this machine",
        {"benchmark@cpu", "generate@cpu"},
        {"report"},
    ),
]
QUICK = [case for case in CASES if case.name in ("opset", "one target's flag")]
# Where a stage that certainly runs comes after others that run, and the quick ones: also with
# stages that write what was there before.
WITH_EQUAL = [*QUICK, *(case for case in CASES if case.name in ("weights", "fleet membership"))]


def hold_against_dvc(plan: Plan, root: Path, other: str, checks: set[str] = CHECKS) -> None:
    """Compare a plan with what `dvc repro` does, whose stages write other or equal bytes."""
    runs, may, restored = (
        stages(plan, outcome) for outcome in (Outcome.RUNS, Outcome.MAY_RUN, Outcome.RESTORED)
    )
    done = reproduce(root, other=other)
    assert done.ran - checks <= runs | may
    assert runs | checks <= done.ran
    assert done.restored - done.ran <= restored | may
    assert restored <= done.restored
    if other:
        assert may <= done.ran | done.restored


@pytest.mark.parametrize("case", long_but(QUICK, CASES), ids=lambda case: case.name)
def test_a_plan_is_what_dvc_does(
    case: Case, clones: Callable[[str], Clone], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = clones("one").path
    overrides = case.change(root)

    plan = plan_run(root, overrides)

    assert stages(plan, Outcome.RUNS) == case.runs
    assert stages(plan, Outcome.MAY_RUN) == case.may
    assert stages(plan, Outcome.RESTORED) == case.restored
    said = [reasons(plan, stage) for stage in case.runs | case.restored]
    assert any(case.reason in text for texts in said for text in texts), said
    compose_params(overrides, root)
    checks = stages(plan, Outcome.CHECK)
    if case in WITH_EQUAL:
        two = root.with_name("two")
        shutil.copytree(root, two, symlinks=True)
        hold_against_dvc(plan, root, "", checks)
        monkeypatch.chdir(root := two)
    hold_against_dvc(plan, root, "!", checks)


def reason_of(plan: Plan, stage: str) -> str:
    (reason,) = reasons(plan, stage)
    return reason


def test_a_library_of_another_version_is_named_with_both(
    clones: Callable[[str], Clone], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = clones("one").path
    real: Any = library()
    monkeypatch.setattr(rtx_fingerprint, "library", lambda: Newer(real))

    plan = plan_run(root, [])

    assert stages(plan, Outcome.RUNS) == {"build@rtx-unet"}
    assert stages(plan, Outcome.MAY_RUN) == {"wrap@rtx-unet", "report"}
    assert reason_of(plan, "build@rtx-unet") == (
        f"fingerprint rtx, tensorrt_rtx: {real.__version__} → 99.0"
    )
    hold_against_dvc(plan, root, "!")
    assert plan_run(root, []).is_idle


class Newer:
    """TensorRT-RTX of a later version."""

    __version__ = "99.0"

    def __init__(self, real: object) -> None:
        self._real = real

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


@long
def test_another_machine_is_named_by_what_differs(
    clones: Callable[[str], Clone], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = clones("one").path
    monkeypatch.setattr(cpu, "instruction_set", lambda: "x86-64-v2")

    plan = plan_run(root, [])

    assert stages(plan, Outcome.RUNS) == {"build@cpu-unet"}
    # Its timings belong to the machine on record; but engines that differ are measured again.
    assert stages(plan, Outcome.MAY_RUN) == {*CPU - {"build@cpu-unet"}, "report"}
    assert "fingerprint cpu, instruction_set:" in reason_of(plan, "build@cpu-unet")
    assert reason_of(plan, "build@cpu-unet").endswith("→ x86-64-v2")
    hold_against_dvc(plan, root, "!")


def test_going_back_is_restored_and_a_change_on_top_of_it_runs(
    clones: Callable[[str], Clone],
) -> None:
    root = clones("one").path
    compose_params(["export.opset=20"], root)
    reproduce(root, other="!")

    back = plan_run(root, [])
    assert stages(back, Outcome.RESTORED) == {"check_conf", *GRAPHS, *CPU, *RTX, "report"}
    assert not stages(back, Outcome.RUNS) | stages(back, Outcome.MAY_RUN)

    # `simplify` is asked for what never was, and what comes of it is unknown from there on.
    on_top = plan_run(root, ["simplify.calls=1"])
    assert stages(on_top, Outcome.RESTORED) >= EXPORTS
    assert stages(on_top, Outcome.RUNS) >= SIMPLIFIED
    assert {*CPU, *RTX, "report"} == stages(on_top, Outcome.MAY_RUN)

    compose_params([], root)
    hold_against_dvc(back, root, "!")


@long
def test_a_clone_without_a_cache_restores_from_the_remote(
    clones: Callable[[str], Clone], tmp_path: Path
) -> None:
    clone = clones("one")
    clone.run("dvc", "remote", "add", "-d", "shared", str(tmp_path / "remote"))
    clone.commit("remote")
    clone.run("dvc", "push", "--run-cache")
    for folder in (".dvc/cache", "artifacts"):
        shutil.rmtree(clone.path / folder)
    clone.run("git", "checkout", "-q", "artifacts")

    alone = plan_run(clone.path, [])
    assert stages(alone, Outcome.RUNS) >= {"check_conf", "download"}
    assert stages(alone, Outcome.RESTORED) == set()
    pulled = plan_run(clone.path, [], pull=True)

    assert stages(pulled, Outcome.RESTORED) == ALL
    assert all(s.remote for s, _ in pulled.stages if s.outcome is Outcome.RESTORED)
    done = reproduce(clone.path, pull=True)
    assert done.ran == CHECKS


def test_what_needs_hardware_that_is_not_here_is_told_before(
    clones: Callable[[str], Clone],
) -> None:
    root = clones("one").path
    join_fleet(root, "a10")

    plan = plan_run(root, [])

    blocked = {"probe@ada", "build@ada-unet", "wrap@ada-unet"}
    assert blocked <= stages(plan, Outcome.BLOCKED)
    assert "A10" in reason_of(plan, "probe@ada")
    assert reason_of(plan, "build@ada-unet") == "it needs probe@ada, which cannot be made"
    compose_params([], root)
    done = reproduce(root)
    assert not done.ran & (blocked - {"probe@ada"})
    assert stages(plan, Outcome.RUNS) <= done.ran


def test_measuring_anew_is_a_reason(clones: Callable[[str], Clone]) -> None:
    root = clones("one").path

    why = why_stages_run(root, ["cpu"])

    assert why is not None
    assert set(why) == {"benchmark@cpu", "generate@cpu", "report"}
    assert [*why["benchmark@cpu"].reasons] == ["cpu is timed anew, on this machine"]
    assert [up.stage for up in why["report"].upstream] == ["benchmark@cpu", "generate@cpu"] * 2


def test_where_all_is_done_nothing_has_to_run(clones: Callable[[str], Clone]) -> None:
    root = clones("one").path

    assert why_stages_run(root, []) is None

    # Not even a check: but for one whose record is lost, or is not what it would write.
    for name in ("fingerprints/cpu.json", "fingerprints/rtx-wrap.json", "machines/cpu.json"):
        path = root / "artifacts" / name
        text = path.read_bytes()
        path.unlink()
        assert why_stages_run(root, []) is not None
        if "fingerprints" in name:
            path.write_text('{"edited": 1}')
            assert why_stages_run(root, []) is not None
        path.write_bytes(text)
    assert why_stages_run(root, []) is None


def test_a_plan_writes_nothing(clones: Callable[[str], Clone]) -> None:
    clone = clones("one")
    before = state(clone.path)

    plan_run(clone.path, ["export.opset=20"])

    assert state(clone.path) == before
    assert not clone.run("git", "status", "--porcelain").output.strip()


def state(root: Path) -> dict[str, int]:
    """When each file was written, but for the cache of hashes that DVC keeps for itself."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in root.rglob("*")
        if path.is_file() and ".git" not in path.parts and "tmp" not in path.parts
    }


def test_what_a_stage_took_last_time_is_what_it_is_expected_to_take(
    clones: Callable[[str], Clone],
) -> None:
    root = clones("one").path
    plan = plan_run(root, ["targets.rtx.build.max_aux_streams=0"])
    found = {stage.stage: estimate for stage, estimate in plan.stages}

    assert found["build@rtx-unet"].seconds == SECONDS
    size = sum(
        path.stat().st_size
        for folder in ("engines/rtx/unet", "logs/build/rtx-unet")
        for path in (root / "artifacts" / folder).iterdir()
    )
    assert found["build@rtx-unet"].bytes == size
    assert found["check_conf"].seconds is None  # it has no log


def test_it_is_printed_for_people_and_for_programs(
    clones: Callable[[str], Clone], capsys: pytest.CaptureFixture[str]
) -> None:
    clones("one")
    flag = "targets.rtx.build.max_aux_streams"

    with pytest.raises(SystemExit) as stopped:
        main(["plan", f"{flag}=0"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 2
    assert f"build@rtx-unet {flag}: null → 0 10 s" in text
    assert "wrap@rtx-unet after build@rtx-unet 10 s" in text
    assert "checks, every time: 3" in text
    assert "2 run (10 s + 1 unknown" in text

    with pytest.raises(SystemExit):
        main(["plan", "--json", f"{flag}=0"])
    document = json.loads(capsys.readouterr().out)
    (build,) = [one for one in document["stages"] if one["stage"] == "build@rtx-unet"]
    assert build["outcome"] == "runs"
    assert build["reasons"] == [{"kind": "param", "what": flag, "text": f"{flag}: null → 0"}]

    main(["plan"])
    assert capsys.readouterr().out.endswith("Nothing is to be done.\n")
