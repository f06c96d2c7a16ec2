"""Run the fp32 PyTorch pipeline and record what engines will be compared with.

Reads   artifacts/weights/
Writes  artifacts/reference/: the inputs and outputs of every component along each denoising
        trajectory, latents, final images, and intermediate images of the first prompt
"""

from dataclasses import dataclass

from diffusion_engines import config, manifests
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.params import param
from diffusion_engines.progress import step
from diffusion_engines.runtime import sampling
from diffusion_engines.runtime.assemble import torch_networks
from diffusion_engines.runtime.recording import record_reference
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    reference: config.Reference = param("reference")
    image: config.Image = param("image")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    reference = cfg.reference
    networks = torch_networks("fp32", "cpu", weights=workspace.weights)
    model = sampling.load_model(workspace.weights)
    settings = sampling.Settings(
        scheduler=reference.scheduler,
        steps=reference.steps,
        guidance_scale=reference.guidance_scale,
        height=cfg.image.height,
        width=cfg.image.width,
        vae_scale_factor=cfg.image.vae_scale_factor,
        negative_prompt=reference.negative_prompt,
        guidance=cfg.image.guidance,
    )
    with new_folder(workspace.reference) as folder:
        with step(f"sample {len(reference.prompts)} prompt(s), {reference.steps} steps, fp32"):
            record_reference(
                networks,
                model,
                settings,
                reference.prompts,
                folder,
                seed=reference.seed,
                batch_size=cfg.image.batch_size,
                frames=reference.frames,
            )
        manifests.write(folder, manifests.Reference(reference.frames))


if __name__ == "__main__":
    main()
