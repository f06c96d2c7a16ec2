"""Build or load a package of two layers: ``python -m … build cpu engine.so``, then ``load``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from diffusion_engines.backends.inductor.building.packaging import compile_program
from diffusion_engines.backends.inductor.library import open_library


def main(verb: str, device: str, path: Path) -> None:
    """Build or load; ends the process with an exception, or with a signal, where it fails.

    Raises:
        AssertionError: the package computes something else.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(device).eval()
    example = torch.randn(4, 64, device=device)
    if verb == "build":
        program = torch.export.export(module, (example,), strict=False)
        # The instruction sets of the CPU are of no interest here.
        compile_program(program, path, device, {"cpp.vec_isa_ok": False})
        return
    run = open_library(path, device, module.state_dict())
    (found,) = run([example])
    with torch.no_grad():
        assert torch.allclose(found, module(example), atol=1e-4), "another result than PyTorch's"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
