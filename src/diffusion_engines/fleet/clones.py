"""Copies of the working tree in which workers run, with the cache of the repository.

A clone and not a worktree of git: a node may be killed in it, and nothing of that is to be left in
the repository's own ``.git``.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from diffusion_engines.dvc_cache import share_cache
from diffusion_engines.ends import foreign_clone
from diffusion_engines.errors import IntegrityError


def make_clone(root: Path, folder: Path) -> None:
    """Make a clone of a working tree as it is now, edits that nobody committed included.

    Its DVC has the cache and the remotes of ``root``.

    Args:
        root: of the repository.
        folder: gets the clone; what is there goes.

    Raises:
        IntegrityError: git cannot clone.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Objects are borrowed, files copied: those of the working tree, and not of a commit.
    _git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root), str(folder))
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        source, copied = root / name, folder / name
        if source.is_symlink() or source.is_file():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copied, follow_symlinks=False)
    _git(folder, "reset", "--quiet")
    share_cache(root, folder)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise foreign_clone(done.stderr, folder) or IntegrityError(
            f"git {arguments[0]} failed in {folder}", found=done.stderr.strip()
        )
    return done.stdout
