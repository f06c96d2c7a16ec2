"""Make a bundle of an engine: self-contained, with a manifest, ready to load from PyTorch.

Select it with `+engine=rtx-unet`.

Where the target has `wrap`, torch-tensorrt writes engine.ts or engine.pt2 beside the plan; that
takes the GPU.
Weights are added here where the engine has none: of an exported program, or of a stripped plan.

Reads   artifacts/engines/<target>/<component>/, artifacts/fingerprints/<target>-wrap.json, and for
        engines of exported programs artifacts/weights/<folder of the component>/, for stripped ones
        artifacts/onnx/<graph>/
Writes  artifacts/bundles/<target>/<component>/
"""

from dataclasses import dataclass

from diffusion_engines import config
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.params import key, param
from diffusion_engines.progress import step
from diffusion_engines.runtime.bundle import wrap_engine
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    engine: str = key("engines")
    item: config.Engine = param("engines.${key}")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    engine = cfg.item
    target = workspace.bundle(engine.target, engine.component)
    with step(f"wrap {cfg.engine}"), new_folder(target) as folder:
        wrap_engine(
            workspace.engine(engine.target, engine.component),
            folder,
            weights=workspace.weights,
            graph=workspace.onnx(engine.graph),
        )


if __name__ == "__main__":
    main()
