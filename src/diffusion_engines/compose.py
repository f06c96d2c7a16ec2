"""Compose ``conf/`` into ``params.yaml``.

The same function of DVC that ``dvc exp run -S`` uses, so both write the same bytes. Plain
``dvc repro`` composes nothing (https://github.com/treeverse/dvc/issues/10750).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from diffusion_engines.config import params_from_config
from diffusion_engines.errors import ConfigError
from diffusion_engines.yaml_files import PARAMS, check_folder


def compose_params(overrides: list[str], root: Path) -> bool:
    """Write ``params.yaml`` if its content changes; return whether it did.

    To be called in :func:`runs.composition`, where a run could read ``params.yaml``.

    Raises:
        ConfigError: as :func:`composed_params`; then ``params.yaml`` stays as it was.
    """
    text, params = composed_params(overrides, root), root / PARAMS
    if params.is_file() and params.read_text() == text:
        return False
    composed = root / ".params.partial.yaml"
    try:
        composed.write_text(text)
        composed.replace(params)
    finally:
        composed.unlink(missing_ok=True)
    return True


def composed_params(overrides: list[str], root: Path) -> str:
    """Return what ``params.yaml`` is to be.

    Raises:
        ConfigError: a file is not YAML, Hydra cannot compose, or the result has unknown keys or
            wrong types.
    """
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    check_folder(root / "conf")
    try:
        with TemporaryDirectory() as folder:
            composed = Path(folder) / PARAMS.name
            compose_and_dump(composed, str(root / "conf"), None, "config", str(root), overrides)
            text = composed.read_text()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            "conf/ cannot be composed", found=str(error), fix="correct conf/ or the override"
        ) from error
    params_from_config(yaml.safe_load(text))
    return text
