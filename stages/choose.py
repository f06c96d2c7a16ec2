"""Choose, of the engines for the same hardware, the fastest of each component that passed.

Select it with `+target=cpu`, a target that has alternatives. (Not called `select`: Python has a
module of that name, which a script beside it would hide.) It writes a record; what a fleet builds
is decided in conf/, never here.

Reads   artifacts/validation/, artifacts/benchmark/
Writes  artifacts/alternatives/<target>/chosen.json
"""

from dataclasses import dataclass

from diffusion_engines import config
from diffusion_engines.backends.targets import Target, device_of
from diffusion_engines.bench.results import read_benchmark
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.params import key, param
from diffusion_engines.parity.results import read_validation
from diffusion_engines.release.alternatives import Measurements, choose_engines
from diffusion_engines.release.chosen import write_chosen
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    target: str = key("alternatives")
    item: config.Alternatives = param("alternatives.${key}")
    targets: dict[str, Target] = param("targets")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()

    def measurements(target: str) -> Measurements:
        return Measurements(
            cfg.targets[target].backend,
            device_of(cfg.targets[target]),
            read_validation(workspace.validation(target)),
            read_benchmark(workspace.benchmark(target)),
        )

    chosen = choose_engines(
        cfg.target,
        measurements(cfg.target),
        {name: measurements(name) for name in cfg.item.targets},
    )
    for component, pick in chosen.components.items():
        print(f"  {component}: {pick.target}, {pick.reason}")
    for target, reason in chosen.passed_over.items():
        print(f"  {target} is passed over: {reason}")
    with new_folder(workspace.alternatives(cfg.target)) as folder:
        write_chosen(chosen, folder)


if __name__ == "__main__":
    main()
