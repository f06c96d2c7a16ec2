"""Keep the timing caches of a target's builds, so that a rebuild is fast and repeatable.

Select it with `+target=a10`. The output persists: each run adds to what earlier ones left, a
folder per fingerprint.

Reads   artifacts/engines/<target>/
Writes  artifacts/timing/<target>/
"""

from dataclasses import dataclass
from pathlib import Path

from diffusion_engines import config
from diffusion_engines.backends.timing import collect_timing_caches
from diffusion_engines.layout import Workspace
from diffusion_engines.params import key, param
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str = key("timing")
    item: config.Timing = param("timing.${key}")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    engines: dict[str, Path] = {
        component: workspace.engine(cfg.target, component) for component in cfg.item.components
    }
    collect_timing_caches(workspace.timing(cfg.target), engines)


if __name__ == "__main__":
    main()
