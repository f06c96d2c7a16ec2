"""Check params.yaml before any work starts: composed from this conf/, well typed, consistent.

Reads   conf/, params.yaml
Writes  artifacts/checks/conf.json, a constant, so that this check invalidates nothing
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines import config, layout
from diffusion_engines.errors import ConfigError
from diffusion_engines.files import write_json
from diffusion_engines.fleet import check_fleet
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    params: dict[str, Any]  # all sections


@stage
def main(cfg: Config) -> None:
    digest = config.conf_digest(Path("conf"))
    if cfg.params["conf_digest"] != digest:
        raise ConfigError(
            "conf/ was edited after params.yaml was composed from it",
            expected=f"conf_digest {digest}",
            found=f"conf_digest {cfg.params['conf_digest']}",
            fix="compose again: `make params` (or `dvc exp run`, which composes by itself)",
        )
    check_fleet(cfg.params)
    write_json(layout.CHECKED_CONF, {"conf": "checked"})


if __name__ == "__main__":
    main()
