"""Put what a pipeline needs besides engines beside the bundles of a target.

Select it with `+target=rtx`. With it, the target's folder can be copied to a server alone and
loaded there with `diffusion_engines.load_pipeline`.

Reads   artifacts/weights/, without the weights themselves
Writes  artifacts/bundles/<target>/pipeline/: tokenizer, noise schedule, configs, manifest.json
"""

from dataclasses import dataclass

from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.params import key
from diffusion_engines.serve.pack import copy_pipeline_files
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str = key("targets")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    with new_folder(workspace.pipeline(cfg.target)) as folder:
        copy_pipeline_files(workspace.weights, folder)


if __name__ == "__main__":
    main()
