"""Make the page, the tables and the figures that a person looks at.

Reads   artifacts/: operators, quantization, engines, logs, reference, validation, benchmark,
        images, fingerprints
Writes  artifacts/report/: index.html (self-contained), breakdown-<target>.png,
        parity-<target>.png, latents-<target>.png, quantization.png, trajectory.gif, fleet.json
"""

from dataclasses import dataclass

from diffusion_engines import config
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.report.page import write_report
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    model: config.Model
    image: config.Image
    exports: dict[str, config.ExportItem]
    quantized: dict[str, config.QuantizedItem]
    engines: dict[str, config.Engine]
    measure: dict[str, config.Measure]


@stage
def main(cfg: Config) -> None:
    # Not a `step`: its log would land in artifacts/logs, which this stage depends on.
    workspace = Workspace()
    with new_folder(workspace.report) as folder:
        write_report(
            workspace,
            folder,
            cfg.model,
            cfg.image,
            cfg.exports,
            cfg.quantized,
            cfg.engines,
            cfg.measure,
        )


if __name__ == "__main__":
    main()
