"""Make the page, the tables and the figures that a person looks at.

Reads   artifacts/: operators, quantization, engines, logs, reference, validation, benchmark,
        images, alternatives
Writes  artifacts/report/: index.html (self-contained), breakdown-<target>.png,
        parity-<target>.png, latents-<target>.png, quantization.png, trajectory.gif, fleet.json
"""

from dataclasses import dataclass

from diffusion_engines import config
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.params import param
from diffusion_engines.report.page import write_report
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    model: config.Model = param("model")
    image: config.Image = param("image")
    graphs: dict[str, config.Graph] = param("graphs")
    engines: dict[str, config.Engine] = param("engines")
    measured: dict[str, config.Measured] = param("measured")
    alternatives: dict[str, config.Alternatives] = param("alternatives")
    prices: dict[str, config.Price] = param("prices")


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
            cfg.graphs,
            cfg.engines,
            list(cfg.measured),
            list(cfg.alternatives),
            cfg.prices,
        )


if __name__ == "__main__":
    main()
