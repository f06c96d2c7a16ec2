"""Parameters do not change under a run: who holds the workspace, and what that refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dvc.lock import make_lock

from diffusion_engines.errors import BusyError
from diffusion_engines.runs import (
    composition,
    dvc_processes,
    only_run,
    refuse_during_a_run,
    started_by_dvc,
)
from tests.conftest import ROOT
from tests.waiting import is_gone, wait_for


def record(root: Path, pid: int) -> None:
    """Write what DVC's own code does while a process of that pid runs a stage."""
    from dvc.fs import localfs
    from dvc.rwlock import _acquire_read, _acquire_write, _edit_rwlock

    folder = root / ".dvc/tmp"
    folder.mkdir(parents=True, exist_ok=True)
    info = {"pid": pid, "cmd": "dvc repro"}
    with _edit_rwlock(str(folder), localfs, False) as lock:
        _acquire_read(lock, info, [str(root / "params.yaml")])
        _acquire_write(lock, info, [str(root / "artifacts/onnx")])


@pytest.fixture
def other() -> int:
    """The pid of a process that runs."""
    return os.getppid()


@pytest.fixture
def dead() -> int:
    """The pid of a process that ran."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_idle_workspace_refuses_nothing(tmp_path: Path) -> None:
    refuse_during_a_run(tmp_path)
    with composition(tmp_path):
        pass


def test_a_stage_under_dvc_refuses_other_parameters(tmp_path: Path, other: int) -> None:
    record(tmp_path, other)
    assert dvc_processes(tmp_path) == {other: "dvc repro"}
    with pytest.raises(BusyError, match=f"process {other}: dvc repro"):
        refuse_during_a_run(tmp_path)
    with pytest.raises(BusyError, match="dvc cache dir --local"), composition(tmp_path):
        pass


def test_what_a_killed_dvc_left_refuses_nothing(tmp_path: Path, dead: int) -> None:
    record(tmp_path, dead)
    refuse_during_a_run(tmp_path)


def test_nor_does_a_dvc_that_nobody_has_collected_yet(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        assert wait_for(lambda: is_gone(zombie.pid))
        assert Path(f"/proc/{zombie.pid}").exists()
        record(tmp_path, zombie.pid)
        refuse_during_a_run(tmp_path)


def test_a_record_is_read_again_while_dvc_writes_it(tmp_path: Path, other: int) -> None:
    record(tmp_path, other)
    path = tmp_path / ".dvc/tmp/rwlock"
    whole = path.read_text()
    path.write_text(whole[:10])
    threading.Timer(0.2, lambda: path.write_text(whole)).start()
    assert dvc_processes(tmp_path) == {other: "dvc repro"}


def test_one_run_holds_a_workspace_and_composes_in_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from diffusion_engines.runs import only_run\n"
        "with only_run(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"process {holder.pid}: make repro"):
            refuse_during_a_run(tmp_path)
        with pytest.raises(BusyError, match="another run works"), only_run(tmp_path):
            pass
        holder.communicate()
    with only_run(tmp_path), composition(tmp_path):  # its own composition is its business
        pass


def test_a_child_with_the_descriptor_holds_the_lock_on(tmp_path: Path) -> None:
    with only_run(tmp_path) as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[lock],
        )
    with pytest.raises(BusyError), only_run(tmp_path):
        pass
    child.communicate()
    with only_run(tmp_path):
        pass


def test_nothing_is_composed_while_dvc_is_between_stages(tmp_path: Path) -> None:
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    with (
        make_lock(str(tmp_path / ".dvc/tmp/lock")),
        pytest.raises(BusyError, match=f"process {os.getpid()}: dvc"),
        composition(tmp_path),
    ):
        pass


def test_the_resolver_that_dvc_composes_with_refuses(tmp_path: Path, other: int) -> None:
    """In a process of its own: Hydra imports its plugins once."""
    for folder in ("conf", "hydra_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__py*"))
    (tmp_path / "models/lemon").mkdir(parents=True)
    shutil.copy(ROOT / "models/lemon/model_index.json", tmp_path / "models/lemon")
    code = (
        "import sys; from dvc.utils.hydra import compose_and_dump\n"
        "root = sys.argv[1]\n"
        "compose_and_dump(root + '/params.yaml', root + '/conf', None, 'config', root, [])\n"
    )

    def compose() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    record(tmp_path, other)
    refused = compose()
    assert refused.returncode == 1
    assert "another run works in this folder" in refused.stderr
    assert not (tmp_path / "params.yaml").exists()
    (tmp_path / ".dvc/tmp/rwlock").unlink()
    done = compose()
    assert done.returncode == 0, done.stderr
    assert "conf_digest" in (tmp_path / "params.yaml").read_text()


def test_a_stage_knows_its_dvc_by_the_record(tmp_path: Path, other: int, dead: int) -> None:
    record(tmp_path, dead)
    assert not started_by_dvc(tmp_path)
    record(tmp_path, other)
    assert started_by_dvc(tmp_path)


def test_the_lock_says_nothing_of_a_run_that_ended(tmp_path: Path) -> None:
    with only_run(tmp_path):
        pass
    path = tmp_path / ".dvc/tmp/repro.lock"
    assert json.loads(path.read_text()) == os.getpid()
    path.write_text("1")  # another process, and the lock is free
    refuse_during_a_run(tmp_path)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="process 1: make repro"):
            refuse_during_a_run(tmp_path)
