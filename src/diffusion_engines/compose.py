"""Compose ``conf/`` into ``params.yaml``: ``python -m diffusion_engines.compose [overrides]``.

The same function of DVC that ``dvc exp run -S`` uses, so both write the same bytes. Plain
``dvc repro`` composes nothing (https://github.com/treeverse/dvc/issues/10750).
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from diffusion_engines.config import params_from_config
from diffusion_engines.errors import ConfigError, DiffusionEnginesError
from diffusion_engines.runs import composition

PARAMS = Path("params.yaml")


def compose_params(overrides: list[str], root: Path) -> bool:
    """Write ``params.yaml`` if its content changes; return whether it did.

    To be called in :func:`runs.composition`, where a run could read ``params.yaml``.

    Raises:
        ConfigError: Hydra cannot compose, or the result has unknown keys or wrong types; then
            ``params.yaml`` stays as it was.
    """
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    composed = root / ".params.partial.yaml"
    try:
        compose_and_dump(composed, str(root / "conf"), None, "config", str(root), overrides)
        params_from_config(yaml.safe_load(composed.read_text()))
        params = root / PARAMS
        if params.is_file() and params.read_bytes() == composed.read_bytes():
            return False
        composed.replace(params)
        return True
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            "conf/ cannot be composed", found=str(error), fix="correct conf/ or the override"
        ) from error
    finally:
        composed.unlink(missing_ok=True)


def main() -> None:
    """Compose with the overrides of the command line."""
    root = Path.cwd()
    try:
        with composition(root):
            changed = compose_params(sys.argv[1:], root)
    except DiffusionEnginesError as error:
        sys.exit(str(error))
    print(f"params.yaml: {'composed anew' if changed else 'up to date'}")


if __name__ == "__main__":
    main()
