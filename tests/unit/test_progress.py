"""A step leaves a line and a record of its time and memory; progress is readable in a log."""

from __future__ import annotations

import os
import time

import pytest

from diffusion_engines import progress as module
from diffusion_engines.progress import StepLog, peak_memory_bytes, progress


def test_a_step_records_its_time_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    log = StepLog()
    with log.step("export unet"):
        time.sleep(0.05)
    (recorded,) = log.steps
    assert recorded["step"] == "export unet"
    assert 0.05 <= float(recorded["seconds"]) < 5
    assert "export unet" in capsys.readouterr().out


def test_a_step_that_fails_is_not_recorded_as_done() -> None:
    log = StepLog()
    with pytest.raises(RuntimeError, match="stop"), log.step("export"):
        raise RuntimeError("stop")
    assert log.steps == []


def test_a_slow_step_shows_that_it_lives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_HEARTBEAT_SECONDS", 0.05)
    with StepLog().step("build"):
        time.sleep(0.2)
    assert capsys.readouterr().err.count("build … 0 s") >= 2


def test_a_slow_step_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_HEARTBEAT_SECONDS", 0.05)
    with StepLog().step("download") as running:
        running.now = lambda: "waiting for the hub"
        time.sleep(0.2)
    assert "  download … 0 s: waiting for the hub\n" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="this system cannot start a new peak of a process's memory",
)
def test_a_step_has_the_peak_of_its_own() -> None:
    log = StepLog()
    with log.step("large"):
        held = b"x" * 200_000_000
        del held
    with log.step("small"):
        pass
    large, small = (int(step["peak_memory_bytes"]) for step in log.steps)
    assert large - small > 150_000_000
    assert peak_memory_bytes() > 10_000_000


def test_progress_yields_everything_and_writes_lines_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_HEARTBEAT_SECONDS", 0.01)
    found = []
    for item in progress(range(5), "denoise"):
        time.sleep(0.03)
        found.append(item)
    assert found == [0, 1, 2, 3, 4]
    text = capsys.readouterr().err
    assert "denoise" in text
    assert "\r" not in text
