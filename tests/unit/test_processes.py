"""Programs of others: their output is kept, and every way of failing is told apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_engines.errors import BuildError
from diffusion_engines.processes import describe_status, run_logged, tail


def run(code: str, folder: Path) -> str:
    return run_logged([sys.executable, "-c", code], folder / "log", what="the tool", fix="mend it")


def test_output_of_both_kinds_is_kept_and_returned(tmp_path: Path) -> None:
    code = "import sys; print('out', flush=True); print('err', file=sys.stderr)"
    output = run(code, tmp_path)
    assert output.splitlines()[1:] == ["out", "err"]
    assert output.startswith(f"$ {sys.executable} -c ")
    assert (tmp_path / "log").read_text() == output


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('why'); raise SystemExit(3)", ["exit status 3", "why"]),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ["SIGSEGV (it crashed)"]),
        ("import os; os.abort()", ["SIGABRT (it crashed)"]),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ["ended by SIGKILL;"]),
        ("raise SystemExit(139)", ["SIGSEGV (it crashed)"]),
    ],
)
def test_a_failure_says_how_it_ended_and_what_it_said(
    tmp_path: Path, code: str, expected: list[str]
) -> None:
    with pytest.raises(BuildError, match="the tool failed") as raised:
        run(code, tmp_path)
    for text in (*expected, "expected: exit status 0", "fix:      mend it"):
        assert text in str(raised.value)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="/no/such/tool could not be started"):
        run_logged(["/no/such/tool"], tmp_path / "log", what="the tool", fix="mend it")


def test_only_the_end_of_a_long_log_is_shown() -> None:
    text = "\n\n".join(str(line) for line in range(100))
    assert tail(text, 3) == "97\n98\n99"
    assert describe_status(1) == "exit status 1"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_the_program_ends_with_its_parent(tmp_path: Path) -> None:
    child = tmp_path / "pid"
    code = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from diffusion_engines.processes import run_logged\n"
            f"run_logged([sys.executable, '-c', {code!r}], Path({str(tmp_path / 'log')!r}), "
            "what='', fix='')",
        ]
    )
    end = time.monotonic() + 60
    while not (child.exists() and child.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    pid = int(child.read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        if Path(f"/proc/{pid}/status").read_text().split("State:")[1].split()[0] == "Z":
            break  # ended, and not yet collected by who adopted it
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()
