"""Keep the timing caches of a target's builds, so that a rebuild is fast and repeatable.

Select it with `+target=a10`. The output persists: each run adds to what earlier ones left, a
folder per fingerprint.

Reads   artifacts/engines/<target>/
Writes  artifacts/timing/<target>/
"""

from dataclasses import dataclass

from diffusion_engines import config
from diffusion_engines.backends.plans.timing import collect_timing_caches
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str
    engines: dict[str, config.Engine]


@stage
def main(cfg: Config) -> None:
    components = [e.component for e in cfg.engines.values() if e.target == cfg.target]
    collect_timing_caches(cfg.target, components)


if __name__ == "__main__":
    main()
