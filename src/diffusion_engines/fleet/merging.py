"""Bring what a worker recorded in its clone into the repository: its stages, its records."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_engines.files import new_file
from diffusion_engines.layout import Workspace
from diffusion_engines.merging import LOCK, merge_stages
from diffusion_engines.plan.reading import parse_yaml_12
from diffusion_engines.runs import composition

Stages = Mapping[str, Any]


def read_stages(root: Path) -> Stages:
    """Return dvc.lock's stages by name; none where nothing was ever built."""
    path = root / LOCK
    content = parse_yaml_12(path.read_text()) if path.is_file() else None
    return (content or {}).get("stages", {})


def merge_clone(root: Path, base: Stages, clone: Path, target: str) -> tuple[list[str], list[str]]:
    """Merge what a worker did into the repository.

    Args:
        root: of the repository.
        base: its stages when the clone was made.
        clone: of the worker.
        target: whose records the worker may have written.

    Returns:
        The stages that the worker changed, and those that somebody else changed otherwise
        meanwhile, which are left out of dvc.lock.

    Raises:
        BusyError: somebody runs DVC in the repository.
    """
    from dvc.utils.serialize import dump_yaml

    with composition(root):
        theirs = read_stages(clone)
        merged, both = merge_stages(base, read_stages(root), theirs)
        changed = [name for name, entry in theirs.items() if base.get(name) != entry]
        if changed:
            with new_file(root / LOCK) as path:
                dump_yaml(str(path), {"schema": "2.0", "stages": merged})
        here, there = Workspace(root), Workspace(clone)
        for name in ("fingerprint", "wrap_fingerprint", "machine"):
            source, record = getattr(there, name)(target), getattr(here, name)(target)
            if source.is_file():
                with new_file(record) as path:
                    shutil.copyfile(source, path)
    return [name for name in changed if name not in both], both
