"""Check params.yaml before any work starts: composed from this conf/, well typed, consistent.

Reads   conf/, params.yaml
Writes  artifacts/checks/conf.json, a constant, so that this check invalidates nothing
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines import config
from diffusion_engines.checks import CHECKED, check_params
from diffusion_engines.errors import ConfigError
from diffusion_engines.files import write_json
from diffusion_engines.layout import Workspace
from diffusion_engines.params import EVERYTHING, param
from diffusion_engines.stage import stage
from diffusion_engines.tables import check_same


@dataclass(frozen=True)
class Config:
    params: dict[str, Any] = param(EVERYTHING)


@stage
def main(cfg: Config) -> None:
    root = Path()
    params = config.params_from_config(cfg.params)
    digest = config.conf_digest(root / "conf")
    if params["conf_digest"] != digest:
        raise ConfigError(
            "conf/ was edited after params.yaml was composed from it",
            expected=f"conf_digest {digest}",
            found=f"conf_digest {params['conf_digest']}",
            fix="compose again: `make params` (or `dvc exp run`, which composes by itself)",
        )
    check_same(cfg.params, root)
    check_params(params, root)
    write_json(Workspace(root).checked_conf, CHECKED)


if __name__ == "__main__":
    main()
