"""Describe this machine, which measurements depend on. Runs at every `dvc repro`.

Reads   this machine and its libraries
Writes  artifacts/fingerprints/machine.json, tracked in git
"""

from dataclasses import dataclass

from diffusion_engines import layout
from diffusion_engines.files import write_json
from diffusion_engines.fingerprint import machine
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    """Nothing of params.yaml."""


@stage
def main(cfg: Config) -> None:
    write_json(layout.MACHINE, machine())


if __name__ == "__main__":
    main()
