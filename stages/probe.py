"""Find what engines for a target depend on beyond their inputs: the target's fingerprint.

Select it with `+target=rtx`. Runs at every `dvc repro`. Where this machine cannot build for the
target, the recorded fingerprint stays, so that finished engines can still be taken from a cache.

Reads   this machine and its libraries
Writes  artifacts/fingerprints/<target>.json: what building depends on, tracked in git
        artifacts/fingerprints/<target>-wrap.json: what wrapping depends on, tracked in git
"""

from dataclasses import dataclass

from diffusion_engines.backends.probe import probe_target
from diffusion_engines.backends.targets import Target
from diffusion_engines.layout import Workspace
from diffusion_engines.params import key, param
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str = key("targets")
    item: Target = param("targets.${key}")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    probe_target(
        cfg.target,
        cfg.item,
        workspace.fingerprint(cfg.target),
        workspace.wrap_fingerprint(cfg.target),
    )


if __name__ == "__main__":
    main()
