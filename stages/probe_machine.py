"""Keep the record of the machine that a target is timed on, or write this machine's where asked.

Select it with `+target=cpu`. Runs at every `dvc repro`. `make measure TARGET=cpu` asks for a new
record; where there is none yet, the first machine that the target is for writes it.

Reads   this machine and its libraries; DIFFUSION_ENGINES_MEASURE, the targets to time anew
Writes  artifacts/machines/<target>.json, tracked in git
"""

import os
from dataclasses import dataclass

from diffusion_engines.backends import backend
from diffusion_engines.backends.targets import Target
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import MEASURE, keep_or_write_record
from diffusion_engines.params import key, param
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str = key("measured")
    settings: Target = param("targets.${key}")


@stage
def main(cfg: Config) -> None:
    settings = cfg.settings
    asked = os.environ.get(MEASURE, "").split(",")
    keep_or_write_record(
        cfg.target,
        Workspace().machine(cfg.target),
        lambda: backend(settings.backend).check_hardware(settings),
        asked=cfg.target in asked,
    )


if __name__ == "__main__":
    main()
