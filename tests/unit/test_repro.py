"""What `make repro` says of stages that failed, and how it ends what it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_engines import repro
from diffusion_engines.errors import ConfigError, HardwareError
from diffusion_engines.failures import (
    Failure,
    failure_from_exception,
    read_failures,
    remove_failure,
    write_failure,
)
from diffusion_engines.repro import _print_failures, stages_after
from tests.doubles.launcher import install
from tests.waiting import is_gone, wait_for


def waiting(stage: str) -> Failure:
    error = HardwareError(
        "not the GPU of the target", expected="H100", found="no GPU", fix="run this there"
    )
    return failure_from_exception(Failure(stage, "h100"), error)


def test_failures_are_read_as_they_were_written(tmp_path: Path) -> None:
    error = ConfigError("no such key", expected="a", found="b", fix="mend it")
    first = failure_from_exception(Failure("export@unet-fp16"), error)
    killed = Failure("build@cpu-unet", "cpu")
    for failure in (first, killed, Failure("report")):
        write_failure(tmp_path, failure)
    remove_failure(tmp_path, Failure("report"))
    assert read_failures(tmp_path) == [first, killed]
    assert first.text == str(error)
    assert "killed" in killed.text


def test_what_waits_for_hardware_is_a_table_and_the_rest_is_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = HardwareError("no space left on the disk", found="0 GB free", fix="free some space")
    failures = [
        waiting("build@h100-unet"),
        waiting("build@h100-vae_decoder"),
        failure_from_exception(Failure("build@cpu-unet", "cpu"), full),
        failure_from_exception(Failure("build@rtx-unet", "rtx"), full),
    ]
    _print_failures(failures, {"wrap@h100-unet", "report"}, 255)
    text = capsys.readouterr().out
    (row,) = [line for line in text.splitlines() if "H100" in line]
    assert "h100" in row
    assert "build@h100-unet, build@h100-vae_decoder" in row
    assert "build@cpu-unet, build@rtx-unet failed: no space left on the disk" in text
    assert text.count("free some space") == 1
    assert "Stale, for they need what is missing: report, wrap@h100-unet" in text


def test_a_long_list_of_stages_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    left = {f"build@{i:02}" for i in range(20)}
    _print_failures([Failure("check_conf", None, "ConfigError", "wrong")], left, 255)
    text = capsys.readouterr().out
    assert "build@05 and 14 more" in text
    assert "not for this machine" not in text


def test_a_failure_of_dvc_itself_points_at_what_dvc_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _print_failures([], set(), 255)
    assert "dvc repro failed with 255; the message above" in capsys.readouterr().out


def test_warnings_that_were_made_errors_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    _print_failures([], set(), 255)
    assert "PYTHONWARNINGS" not in capsys.readouterr().out
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    _print_failures([], set(), 255)
    assert "PYTHONWARNINGS=error makes errors of DVC's own warnings" in capsys.readouterr().out


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A repository with four stages in a row, and one that stands alone."""
    subprocess.run(["dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  a: {cmd: touch a, outs: [a]}\n"
        "  b: {cmd: touch out/b, deps: [a], outs: [out/b]}\n"
        "  c: {cmd: touch c, deps: [out], outs: [c]}\n"
        "  alone: {cmd: touch d, outs: [d]}\n"
    )
    return tmp_path


# Of pygtrie, in DVC's own code.
@pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")
def test_stale_is_what_needs_the_missing_directly_or_not(toy: Path) -> None:
    assert stages_after(["a"], toy) == {"b", "c"}
    assert stages_after(["a", "b"], toy) == {"c"}
    assert stages_after(["c", "alone", "unknown"], toy) == set()


DVC = """\
import os, signal, sys, time
from pathlib import Path
Path("pid").write_text(str(os.getpid()))
if "DVC_DOUBLE_IGNORES_INTERRUPTS" in os.environ:  # as dvc does while a stage runs
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
time.sleep(60)
"""
RUN = """\
from pathlib import Path
from diffusion_engines import repro
repro.compose_params = lambda overrides, root: False
repro.why_stages_run = lambda root, asked: {}
repro.reproduce(Path.cwd(), [])
"""


def test_where_nothing_has_to_run_dvc_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repro, "compose_params", lambda overrides, root: False)
    monkeypatch.setattr(repro, "why_stages_run", lambda root, asked: None)
    monkeypatch.setattr(repro, "_run_dvc", lambda *_: pytest.fail("dvc was started"))
    repro.reproduce(tmp_path, [])
    assert "nothing runs" in capsys.readouterr().out


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], int]]:
    """Start `make repro`'s Python with a double of dvc; return it and the double's pid."""
    install(tmp_path / "bin", "dvc", DVC)

    def started(**variables: str) -> tuple[subprocess.Popen[str], int]:
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        process = subprocess.Popen(
            [sys.executable, "-c", RUN],
            cwd=tmp_path,
            env=os.environ | {"PATH": path} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        pid = tmp_path / "pid"
        assert wait_for(lambda: pid.exists() and pid.read_text())
        return process, int(pid.read_text())

    return started


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_dvc_ends_with_a_killed_make_repro(start, tmp_path: Path) -> None:
    process, dvc = start()
    process.kill()
    process.communicate()
    assert wait_for(lambda: is_gone(dvc))
    again, _ = start()  # the lock is free
    again.kill()
    assert "another run" not in again.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_dvc_first(start, number: signal.Signals) -> None:
    process, dvc = start()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert is_gone(dvc)
    assert process.returncode == 128 + number
    assert stderr.endswith("stopped; `make repro` goes on from what was finished\n")


def test_an_interrupt_that_dvc_ignores_reaches_it_later(start) -> None:
    process, dvc = start(DVC_DOUBLE_IGNORES_INTERRUPTS="1")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert is_gone(dvc)
    assert process.returncode == 128 + signal.SIGINT


def test_while_dvc_lives_another_run_is_refused(start) -> None:
    process, dvc = start()
    second = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=Path(f"/proc/{process.pid}/cwd").readlink(),
        capture_output=True,
        text=True,
        check=False,
    )
    process.kill()
    process.communicate()
    assert second.returncode == 1
    assert f"process {process.pid}: make repro" in second.stderr
    assert wait_for(lambda: is_gone(dvc))
