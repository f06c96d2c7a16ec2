"""Make images of prompts with the engines of a target.

By hand:  python stages/generate.py prompt="A big banana leaf with lemons in front of it" target=cpu
Several prompts: `prompt=` again. Every key of conf/generate/ can be given: `steps=30 seed=7`.
`folder=pictures/leaf` keeps the images; otherwise the next run replaces them.

Reads   artifacts/bundles/<target>/, artifacts/weights/ for components without an engine
Writes  artifacts/images/<target>/: image-NN.png with its settings, image-NN.gif, timings.json
"""

from dataclasses import dataclass
from pathlib import Path

from diffusion_engines import config
from diffusion_engines.backends.targets import Target, device_of
from diffusion_engines.errors import ConfigError
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.runtime.assemble import engine_components
from diffusion_engines.serve.generation import generate_images
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str
    engines: dict[str, config.Engine]
    targets: dict[str, Target]
    generate: config.Generate
    image: config.Image


@stage
def main(cfg: Config) -> None:
    workspace, wanted = Workspace(), cfg.generate.folder
    target = Path(wanted).expanduser() if wanted else workspace.images(cfg.target)
    if wanted and target.exists():
        raise ConfigError(f"generate.folder: {target} exists", fix="choose a new folder")
    with new_folder(target) as folder:
        generate_images(
            cfg.target,
            engine_components(cfg.target, cfg.engines),
            cfg.generate,
            cfg.image,
            folder,
            workspace=workspace,
            device=device_of(cfg.targets[cfg.target]),
        )
    print(f"  {len(list(target.glob('*.png')))} image(s) in {target}")


if __name__ == "__main__":
    main()
