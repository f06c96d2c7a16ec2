"""The resolver behind ``conf_digest: ${conf_digest:}`` in ``conf/config.yaml``.

DVC imports the repository's ``hydra_plugins/`` when it composes ``conf/``, and Hydra imports it
when it starts, so the resolver is there in both.
"""

from pathlib import Path

from omegaconf import OmegaConf

from diffusion_engines.config import conf_digest
from diffusion_engines.runs import refuse_during_a_run

_ROOT = Path(__file__).parents[1]


def _digest() -> str:
    refuse_during_a_run(_ROOT)
    return conf_digest(_ROOT / "conf")


OmegaConf.register_new_resolver("conf_digest", _digest, replace=True)
