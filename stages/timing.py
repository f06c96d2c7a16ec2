"""Keep the timing caches of a target's builds, so that a rebuild is fast and repeatable.

Select it with `+target=a10`. The output persists: each run adds to what earlier ones left, a
folder per fingerprint.

Reads   artifacts/engines/<target>/
Writes  artifacts/timing/<target>/
"""

from dataclasses import dataclass
from pathlib import Path

from diffusion_engines import config, layout
from diffusion_engines.backends.timing import collect_timing_caches
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str
    engines: dict[str, config.Engine]


@stage
def main(cfg: Config) -> None:
    engines: dict[str, Path] = {
        engine.component: layout.engine(cfg.target, engine.component)
        for engine in cfg.engines.values()
        if engine.target == cfg.target
    }
    collect_timing_caches(layout.timing(cfg.target), engines)


if __name__ == "__main__":
    main()
