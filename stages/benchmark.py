"""Time a target's engines and PyTorch in one run: latency by phase, memory, throughput.

Select it with `+target=cpu`.

Reads   artifacts/bundles/<target>/, artifacts/weights/, artifacts/machines/<target>.json; of an
        alternative, also the bundles of the target that it is one to
Writes  artifacts/benchmark/<target>/benchmark.json
        artifacts/metrics/benchmark/<target>.json, artifacts/plots/benchmark/<target>.csv
"""

import os
from dataclasses import dataclass

from diffusion_engines import config
from diffusion_engines.backends.targets import Target, device_of
from diffusion_engines.bench.compare import TimedEngines, benchmark_target
from diffusion_engines.bench.results import write_benchmark
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import machine_of_result
from diffusion_engines.params import key, param
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str = key("measured")
    item: config.Measured = param("measured.${key}")
    settings: Target = param("targets.${key}")
    benchmark: config.Benchmark = param("benchmark")
    image: config.Image = param("image")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    other = cfg.item.alternative_to
    filed = "DVC_STAGE" in os.environ
    machine = machine_of_result(cfg.target, workspace.machine(cfg.target), filed=filed)
    result = benchmark_target(
        cfg.target,
        cfg.item.components,
        cfg.benchmark,
        cfg.image,
        workspace,
        machine,
        device=device_of(cfg.settings),
        beside=TimedEngines(other, cfg.item.beside) if other else None,
    )
    with new_folder(workspace.benchmark(cfg.target)) as folder:
        write_benchmark(
            result,
            folder,
            workspace.metrics("benchmark", cfg.target),
            workspace.plot("benchmark", cfg.target),
        )


if __name__ == "__main__":
    main()
