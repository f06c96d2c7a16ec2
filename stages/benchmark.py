"""Time a target's engines and PyTorch in one run: latency by phase, memory, throughput.

Select it with `+target=cpu`.

Reads   artifacts/bundles/<target>/, artifacts/weights/, artifacts/fingerprints/machine.json
Writes  artifacts/benchmark/<target>/benchmark.json
        artifacts/metrics/benchmark/<target>.json, artifacts/plots/benchmark/<target>.csv
"""

from dataclasses import dataclass

from diffusion_engines import config, layout
from diffusion_engines.backends.targets import Target, device_of
from diffusion_engines.bench.compare import benchmark_target
from diffusion_engines.bench.results import write_benchmark
from diffusion_engines.files import new_folder, read_json
from diffusion_engines.layout import Workspace
from diffusion_engines.runtime.assemble import engine_components
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str
    engines: dict[str, config.Engine]
    targets: dict[str, Target]
    benchmark: config.Benchmark
    image: config.Image


@stage
def main(cfg: Config) -> None:
    workspace, machine = Workspace(), read_json(layout.MACHINE)
    result = benchmark_target(
        cfg.target,
        engine_components(cfg.target, cfg.engines),
        cfg.benchmark,
        cfg.image,
        workspace,
        machine,
        device=device_of(cfg.targets[cfg.target]),
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
