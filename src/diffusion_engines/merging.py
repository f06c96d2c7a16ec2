"""Merge dvc.lock after two machines have each recorded results of their own.

Git sees lines; dvc.lock is a table with a row for each stage. What one side changed is taken from
that side. What both changed, each in its own way, is left out, so that `dvc repro` makes it anew
from the merged rest: of two machines that each measured their own target, that is `report`.
"""

from __future__ import annotations

import subprocess
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_engines.ends import foreign_clone
from diffusion_engines.errors import IntegrityError

LOCK = "dvc.lock"
Stages = Mapping[str, Any]


def merge_stages(base: Stages, ours: Stages, theirs: Stages) -> tuple[dict[str, Any], list[str]]:
    """Return the stages of the merged lock, and those that both sides changed, which are left out.

    A stage that one side removed and the other left alone is removed.
    """
    merged: dict[str, Any] = {}
    both: list[str] = []
    for name in dict.fromkeys([*ours, *theirs]):
        before, one, other = base.get(name), ours.get(name), theirs.get(name)
        if other in (one, before):
            kept = one
        elif one == before:
            kept = other
        else:
            both.append(name)
            continue
        if kept is not None:
            merged[name] = kept
    return merged, both


def merge_lock(root: Path) -> list[str]:
    """Resolve git's conflict in dvc.lock and stage the result; return the stages that run again.

    Args:
        root: of the repository, in the middle of a `git merge`, `rebase` or `pull`.

    Raises:
        IntegrityError: git has no conflict in dvc.lock.
        HardwareError: the repository belongs to somebody else.
    """
    from dvc.utils.serialize import dump_yaml

    # What git keeps of a file in conflict: 1 the common ancestor, 2 ours, 3 theirs.
    sides = [_side(root, number) for number in (1, 2, 3)]
    if sides[1] is None or sides[2] is None:
        raise IntegrityError(
            f"{LOCK} is not in conflict",
            expected="a `git merge`, `git pull` or `git rebase` that has stopped at it",
            found="no two versions of it in git's index",
            fix="`git status` says where the merge stands",
        )
    base, ours, theirs = ((side or {}).get("stages", {}) for side in sides)
    merged, both = merge_stages(base, ours, theirs)
    dump_yaml(str(root / LOCK), {**sides[1], "stages": merged})
    subprocess.run(["git", "add", LOCK], cwd=root, check=True)
    return both


def _side(root: Path, number: int) -> dict[str, Any] | None:
    from dvc.utils.serialize import parse_yaml

    done = subprocess.run(
        ["git", "show", f":{number}:{LOCK}"], cwd=root, capture_output=True, check=False
    )
    if done.returncode:
        if foreign := foreign_clone(done.stderr.decode(errors="replace"), root):
            raise foreign
        return None
    # DVC's YAML is 1.2: to PyYAML, its 1e-05 is a text.
    return typing.cast(dict[str, Any], parse_yaml(done.stdout.decode(), f"{number}:{LOCK}"))
