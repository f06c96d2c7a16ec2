"""Write one component for one target as an exported program, which PyTorch's compiler takes.

Select it with `+engine=cpu_inductor-unet`.

A program is without weights, and of the PyTorch that the target's fingerprint names: where another
one is installed, it waits for a machine that has it.

Reads   artifacts/weights/<folder of the component>/config.json, artifacts/weights/model_index.json,
        artifacts/fingerprints/<target>.json
Writes  artifacts/programs/<target>/<component>/: program.json, manifest.json, and
        constants.safetensors where the network has tensors that are no weights
"""

from dataclasses import dataclass

from diffusion_engines import config, manifests
from diffusion_engines.errors import HardwareError
from diffusion_engines.families import family_of
from diffusion_engines.files import new_folder, read_json
from diffusion_engines.layout import Workspace
from diffusion_engines.onnx.versions import program_versions
from diffusion_engines.params import key, param
from diffusion_engines.programs.reading import torch_version
from diffusion_engines.programs.writing import write_program
from diffusion_engines.progress import step
from diffusion_engines.runtime.networks import read_config
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    engine: str = key("programs")
    item: config.Program = param("programs.${key}")
    dynamic: config.Dynamic = param("export.dynamic")
    image: config.Image = param("image")


@stage
def main(cfg: Config) -> None:
    workspace, item = Workspace(), cfg.item
    _check_version(workspace, item.target)
    component = family_of(workspace.weights).component(item.component)
    network = workspace.weights / item.weights
    inputs = component.inputs(read_config(component, network), cfg.image, cfg.dynamic)
    with new_folder(workspace.program(item.target, item.component)) as folder:
        with step(f"export {cfg.engine} with torch.export"):
            write_program(component, network, inputs, folder, precision=item.precision)
        manifest = manifests.program_without_weights(
            name=f"{item.component}-{item.precision}",
            component=item.component,
            precision=item.precision,
            inputs=inputs,
            outputs=component.outputs,
            guidance=cfg.image.guidance,
            versions=program_versions(),
        )
        manifests.write(folder, manifest)


def _check_version(workspace: Workspace, target: str) -> None:
    recorded = read_json(workspace.fingerprint(target)).get("torch")
    if recorded != (here := torch_version()):
        raise HardwareError(
            f"engines of the target {target} are built with another PyTorch",
            expected=f"{recorded}, as in {workspace.fingerprint(target)}",
            found=here,
            fix="run it where the target is built: an exported program is of one PyTorch",
        )


if __name__ == "__main__":
    main()
