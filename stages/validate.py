"""Compare a target's engines with the fp32 reference: each call, whole runs, and their images.

Select it with `+target=cpu`. The measurements are written first; a missed tolerance fails after.

Reads   artifacts/bundles/<target>/, artifacts/reference/, artifacts/weights/, and the networks
        that score images, where validate.scorers has some
Writes  artifacts/validation/<target>/: errors of every call and every step, the engines' images
        artifacts/metrics/validate/<target>.json, artifacts/plots/validate/<target>/
"""

from dataclasses import dataclass

from diffusion_engines import config
from diffusion_engines.backends.targets import Target, device_of
from diffusion_engines.errors import GateError
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.parity.results import write_validation
from diffusion_engines.parity.validation import validate_target
from diffusion_engines.runtime.assemble import engine_components
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str
    engines: dict[str, config.Engine]
    targets: dict[str, Target]
    validate: config.Validate


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    result, pictures = validate_target(
        cfg.target,
        engine_components(cfg.target, cfg.engines),
        cfg.validate,
        workspace,
        device=device_of(cfg.targets[cfg.target]),
    )
    with new_folder(workspace.validation(cfg.target)) as folder:
        write_validation(
            result,
            pictures,
            folder,
            workspace.metrics("validate", cfg.target),
            workspace.plots("validate", cfg.target),
        )
    if misses := result.misses:
        raise GateError(
            f"the engines of {cfg.target} miss {len(misses)} tolerance(s):\n  - "
            + "\n  - ".join(misses[:20]),
            fix="if the precision is known to cost this much, widen its tolerance in\n"
            f"conf/validate/; the measurements are in {workspace.validation(cfg.target)}",
        )


if __name__ == "__main__":
    main()
