"""params.yaml as conf/ composes to it, with any overrides, without writing into the repository."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import yaml

from diffusion_engines.tables import derive_tables

ROOT = Path(__file__).parents[1]


@functools.cache
def _composed(overrides: tuple[str, ...], conf: Path) -> dict[str, Any]:
    from dvc.utils.hydra import compose_and_dump

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        compose_and_dump(path, str(conf), None, "config", str(ROOT), list(overrides))
        return yaml.safe_load(path.read_text())


def composed(*overrides: str, conf: Path = ROOT / "conf") -> dict[str, Any]:
    """Return the composition, as plain data to change."""
    return copy.deepcopy(_composed(overrides, conf))


def derived(params: dict[str, Any]) -> dict[str, Any]:
    """Return params with the tables that follow from their other sections."""
    return params | derive_tables(params, ROOT)
