"""What ends a process from outside is said in words that are true, with another status than 0."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines import cli
from diffusion_engines.ends import error_with_remedy
from diffusion_engines.errors import DiffusionEnginesError, HardwareError
from diffusion_engines.merging import merge_lock


def run(body: str, *options: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a script whose work is ``body``; its standard output is the caller's to choose."""
    script = (
        "import os, signal, sys, warnings\n"
        "from diffusion_engines.ends import one_line_at_the_end\n"
        "with one_line_at_the_end('work'):\n"
        f"    {body}\n"
    )
    # Buffered as for a person, whatever this run of the tests has.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *options, "-c", script],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        check=False,
        **kwargs,
    )


@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "sys.exit(0 * print())"])
def test_an_output_that_is_full_is_no_full_disk(body: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(body, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("the output could not be written: no space left where it is")
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)"])
def test_a_reader_who_leaves_ends_it(body: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `head -1` after its line
    try:
        done = run(body, stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == "work: nobody reads the output any more\n"


def test_a_limit_on_files_is_no_full_disk(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    body = f"with open({str(tmp_path / 'file')!r}, 'wb') as f: f.write(bytes(5000))"
    done = run(body, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith("a file became larger than this shell's limit on files")
    assert "a limit of 1024 bytes" in done.stderr
    assert "ulimit -f unlimited" in done.stderr


def test_ctrl_c_is_no_traceback() -> None:
    done = run("os.kill(os.getpid(), signal.SIGINT)")
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "\nwork interrupted\n"


def test_a_warning_that_was_made_an_error_is_named() -> None:
    done = run("warnings.warn('soon gone', DeprecationWarning)", "-W", "error")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "a library's warning was made an error: DeprecationWarning: soon gone\n"
    )
    assert "without PYTHONWARNINGS=error" in done.stderr


def test_a_surprise_keeps_its_traceback() -> None:
    done = run("raise RuntimeError('surprise')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "no space left on the disk for {file}\n  found:    "),
        (errno.EDQUOT, "your disk quota is used up for {file}\n"),
        (errno.EFBIG, "a file became larger than its file system takes for {file}\n"),
        (errno.EROFS, "no access to {file}: Read-only file system\n"),
        (errno.EACCES, "no access to {file}: Permission denied\n"),
    ],
)
def test_each_reason_has_its_own_words(tmp_path: Path, number: int, expected: str) -> None:
    file = str(tmp_path / "not there" / "file")
    known = error_with_remedy(OSError(number, os.strerror(number), file))
    assert str(known).startswith(expected.format(file=file))
    assert "\n  fix:      " in str(known)
    wrapped = RuntimeError("a library's own")
    wrapped.__cause__ = OSError(number, os.strerror(number), file)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert str(error_with_remedy(wrapped)) == str(known)


def test_of_a_copy_the_file_that_is_written_is_named(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "source", None, str(tmp_path / "new"))
    assert f"no space left on the disk for {tmp_path / 'new'}" in str(error_with_remedy(error))


def test_what_is_no_reason_from_outside_is_none() -> None:
    for error in (RuntimeError("surprise"), FileNotFoundError(errno.ENOENT, "no", "file")):
        assert error_with_remedy(error) is None
    own = DiffusionEnginesError("ours")
    assert error_with_remedy(own) is own


def test_a_clone_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests take it
    with pytest.raises(HardwareError, match="belongs to another user") as raised:
        merge_lock(tmp_path)
    assert f"git config --global --add safe.directory {tmp_path}" in str(raised.value)


def test_a_command_outside_of_a_repository_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        cli.main(["verify"])
    assert str(raised.value.code).startswith("DVC: ")
    assert "is not a git repository" in str(raised.value.code)


def _may_mount() -> bool:
    done = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux" or not _may_mount(), reason="may not mount")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    (folder / "conf").mkdir(parents=True)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c",
         'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && cd "$1" && exec "$2" -m '
         "diffusion_engines.cli compose", "sh", folder, sys.executable],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"no access to {folder}/.dvc")
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
