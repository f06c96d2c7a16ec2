"""Compare a target's engines with the fp32 reference: each call, whole runs, and their images.

Select it with `+target=cpu`. The measurements are written first; a missed tolerance fails after,
but of a target that is an alternative to another one.

Reads   artifacts/bundles/<target>/, artifacts/reference/, artifacts/weights/, and the networks
        that score images, where validate.scorers has some
Writes  artifacts/validation/<target>/: errors of every call and every step, the engines' images
        artifacts/metrics/validate/<target>.json, artifacts/plots/validate/<target>/
"""

from dataclasses import dataclass

from diffusion_engines import config
from diffusion_engines.backends.targets import Target, device_of
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.params import key, param
from diffusion_engines.parity.results import write_validation
from diffusion_engines.parity.validation import judge, validate_target
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str = key("measured")
    item: config.Measured = param("measured.${key}")
    settings: Target = param("targets.${key}")
    validate: config.Validate = param("validate")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    result, pictures = validate_target(
        cfg.target,
        cfg.item.components,
        cfg.validate,
        workspace,
        device=device_of(cfg.settings),
    )
    with new_folder(workspace.validation(cfg.target)) as folder:
        write_validation(
            result,
            pictures,
            folder,
            workspace.metrics("validate", cfg.target),
            workspace.plots("validate", cfg.target),
        )
    print(judge(result, cfg.item.alternative_to, workspace.validation(cfg.target)))


if __name__ == "__main__":
    main()
