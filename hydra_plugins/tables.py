"""The resolver behind ``${table:engines}`` in ``conf/config.yaml``, and the group ``precision``.

DVC imports the repository's ``hydra_plugins/`` when it composes ``conf/``, and Hydra imports it
when it starts, so both derive the same tables and know the same precisions.
"""

from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.tables import declared_choice, derive_tables

_ROOT = Path(__file__).parents[1]
_INPUTS = ("model", "targets", "fleet", "measure", "quantize")


def _table(name: str, *, _root_: DictConfig) -> Any:
    config = {key: OmegaConf.to_container(_root_[key], resolve=True) for key in _INPUTS}
    return OmegaConf.create(derive_tables(config, _ROOT)[name])


OmegaConf.register_new_resolver("table", _table, replace=True)
for _precision in PRECISIONS:
    # `- /precision@fleet.cpu: fp32` in a fleet's defaults
    ConfigStore.instance().store(
        group="precision", name=_precision, node=declared_choice(_precision)
    )
