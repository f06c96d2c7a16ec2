"""Why a stage runs: what was known before the run, and what became of the stages before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_engines.files import read_json
from diffusion_engines.stage import _run
from diffusion_engines.why import (
    WHY,
    Run,
    Upstream,
    Why,
    reasons_of,
    run_file,
    run_from_json,
    write_run,
    write_why,
)
from tests.unit.test_stage import Nothing

LOCK = """\
schema: '2.0'
stages:
  export@unet-fp32:
    cmd: python stages/export.py
    outs:
    - {path: artifacts/exports/unet-fp32, md5: %s.dir, size: 3}
    - {path: artifacts/logs/export/unet-fp32, md5: 44.dir, size: 3}
"""
UPSTREAM = (
    Upstream("export@unet-fp32", "artifacts/exports/unet-fp32", "11.dir"),
    Upstream("reference", "artifacts/reference", None),
)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ("22", ["artifacts/exports/unet-fp32 is another one (export@unet-fp32 ran)"]),
        ("11", []),
    ],
)
def test_outputs_that_became_others_are_reasons(tmp_path: Path, now: str, said: list[str]) -> None:
    (tmp_path / "dvc.lock").write_text(LOCK % now)
    write_why(tmp_path / "why.json", {"simplify@unet-fp32": Why(["its code changed"], UPSTREAM)})

    found = reasons_of("simplify@unet-fp32", tmp_path / "why.json", tmp_path)

    assert found == ["its code changed", *said]
    assert reasons_of("report", tmp_path / "why.json", tmp_path) == []


def test_a_stage_that_nobody_planned_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(cfg: Nothing) -> None: ...

    monkeypatch.chdir(tmp_path)
    write_why(tmp_path / "why.json", {"report": Why(["a", "b"], [])})
    _run(main, "report", {})  # by hand
    monkeypatch.setenv(WHY, str(tmp_path / "why.json"))
    _run(main, "report", {})
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("DVC_STAGE", "report")
    _run(main, "report", {})
    assert capsys.readouterr().out == "  because a\n      and b\n"


def test_how_a_stage_ran_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = run_file("build@rtx-unet", tmp_path)
    assert path == tmp_path / "artifacts/logs/build/rtx-unet/run.json"
    run = Run(12.5, ["the flag changed"])
    write_run(path, run)
    assert run_from_json(read_json(path)) == run
    assert run_from_json({"format": 0, "minutes": 1}) is None
