"""Make images of prompts with the engines of a target.

By hand:  python stages/generate.py prompt="A big banana leaf with lemons in front of it" target=cpu
Several prompts: `prompt=` again. Every key of conf/generate/ can be given: `steps=30 seed=7`.
`folder=pictures/leaf` keeps the images; otherwise the next run replaces them.

Reads   artifacts/bundles/<target>/, artifacts/weights/ for components without an engine
Writes  artifacts/images/<target>/: image-NN.png with its settings, image-NN.gif, durations.json
"""

import os
from dataclasses import dataclass
from pathlib import Path

from diffusion_engines import config
from diffusion_engines.backends.targets import Target, device_of
from diffusion_engines.errors import ConfigError
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import machine_of_result
from diffusion_engines.params import key, param
from diffusion_engines.serve.generation import generate_images
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str = key("measured")
    item: config.Measured = param("measured.${key}")
    settings: Target = param("targets.${key}")
    generate: config.Generate = param("generate")
    image: config.Image = param("image")


@stage
def main(cfg: Config) -> None:
    workspace, wanted = Workspace(), cfg.generate.folder
    target = Path(wanted).expanduser() if wanted else workspace.images(cfg.target)
    if wanted and target.exists():
        raise ConfigError(f"generate.folder: {target} exists", fix="choose a new folder")
    filed = "DVC_STAGE" in os.environ
    machine = machine_of_result(cfg.target, workspace.machine(cfg.target), filed=filed)
    with new_folder(target) as folder:
        generate_images(
            cfg.target,
            cfg.item.components,
            cfg.generate,
            cfg.image,
            folder,
            device=device_of(cfg.settings),
            machine=machine,
            workspace=workspace,
        )
    print(f"  {len(list(target.glob('*.png')))} image(s) in {target}")


if __name__ == "__main__":
    main()
