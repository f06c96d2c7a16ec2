"""Working copies in which the points of a sweep run, beside the one that a person works in.

A copy has what the person's has at the start, edits that are not committed included, and shares its
cache. Its experiments are fetched back; then it is removed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_engines.dvc_cache import share_cache
from diffusion_engines.errors import ConfigError, DiffusionEnginesError
from diffusion_engines.files import copy_files
from diffusion_engines.processes import death_with_parent, tail

# Records that git tracks, or will: those of this machine, and of others that it must not replace.
_RECORDS = ("artifacts/fingerprints", "artifacts/machines", "dvc.lock")
# What no stage of a copy could make again, and a build starts from.
_TIMING = Path("artifacts/timing")
_IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "sweep"), ("EMAIL", "sweep@localhost"))
}


@dataclass(frozen=True)
class Start:
    """What a working copy begins with.

    Attributes:
        root: of the repository that it is a copy of.
        commit: that is checked out there.
        edits: of what git tracks there, as git's diff.
        carried: other files that stages depend on, relative to the root.
    """

    root: Path
    commit: str
    edits: bytes
    carried: tuple[str, ...]


def read_start(root: Path, needed: Iterable[str]) -> Start:
    """Return what is there now.

    Args:
        root: of the repository.
        needed: the paths that stages depend on and none makes.

    Raises:
        ConfigError: nothing is committed yet, or git is not there.
    """
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        prefix = ("-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false")
        edits = _git(root, *prefix, "diff", "--binary", "--no-color", "--no-ext-diff", "HEAD")
        inside = sorted(path for path in {*needed, *_RECORDS} if not Path(path).is_absolute())
        others = _git(root, "ls-files", "-z", "--others", "--exclude=__pycache__", "--", *inside)
    except DiffusionEnginesError as error:
        raise ConfigError(
            "a sweep starts from a commit, and its points are experiments of it",
            expected="a git repository with a commit",
            found=error.found,
            fix="`git add -A && git commit`",
        ) from error
    return Start(root, commit, edits, tuple(filter(None, others.decode().split("\0"))))


def make_clone(start: Start, folder: Path) -> Path:
    """Make a working copy in ``folder``, which is replaced; return its root."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    root = start.root.resolve()
    _git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root), str(folder))
    _git(folder, "checkout", "--quiet", "--detach", start.commit)
    if start.edits:
        _git(folder, "apply", "--whitespace=nowarn", "-", stdin=start.edits)
    for name in start.carried:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _link(root / name, folder / name)
    if (root / _TIMING).is_dir():
        copy_files(root / _TIMING, folder / _TIMING)
    share_cache(root, folder)
    return folder


def _link(source: Path, target: Path) -> None:
    """Share a file that nothing changes; copy it where that cannot be."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def variables(clone: Path) -> Mapping[str, str]:
    """Return the environment of programs of a working copy: its library, not the person's.

    Else what is edited while a sweep runs would change its results, and not what they are recorded
    under.
    """
    paths = [str((clone / "src").resolve()), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def save_experiment(start: Start, clone: Path, name: str) -> None:
    """Record the state of a working copy, all of whose stages ended well, as an experiment.

    One of the same name is replaced.

    Raises:
        DiffusionEnginesError: DVC or git could not.
    """
    records = [f"--include-untracked={path}" for path in _RECORDS if (clone / path).exists()]
    command = [sys.executable, "-m", "dvc", "exp", "save", "--quiet", "--force", f"--name={name}"]
    _run([*command, *records], clone, env={**variables(clone), **_IDENTITY})
    listed = _git(clone, "for-each-ref", "--format=%(refname)", "refs/exps").decode().split()
    for ref in listed:
        if ref.startswith(f"refs/exps/{start.commit[:2]}/") and ref.endswith(f"/{name}"):
            _git(start.root, "fetch", "--quiet", "--force", str(clone), f"{ref}:{ref}")


def _git(root: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    return _run(["git", *arguments], root, stdin=stdin)


def _run(
    command: list[str], folder: Path, *, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> bytes:
    """Return the output of a program, which ends with this process.

    Raises:
        DiffusionEnginesError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        input=stdin,
        capture_output=True,
        env=None if env is None else dict(env),
        check=False,
        preexec_fn=death_with_parent(),
    )
    if done.returncode:
        raise DiffusionEnginesError(
            f"{' '.join(command[:4])} … failed",
            found=tail((done.stderr + done.stdout).decode(errors="replace"), 5),
            fix="mend what it says, and give the same command again",
        )
    return done.stdout
