"""An engine's shared library in this process, with weights from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.errors import IntegrityError

Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


def open_library(path: Path, device: str, weights: Mapping[str, torch.Tensor]) -> Run:
    """Load a library into this process, with weights that it neither copies nor owns.

    The runner and not ``aoti_load_package``, which first compiles test programs for a warning about
    the CPU: 54 s on an H100 (https://github.com/pytorch/pytorch/issues/191715).

    Args:
        path: of the library.
        device: that it was compiled for.
        weights: by their names in the network, with the strides that it was compiled for; kept
            alive by the result.

    Raises:
        IntegrityError: weights are missing, or the library cannot be loaded.
    """
    aoti: Any = torch._C._aoti
    try:
        if device == "cuda":
            runner = aoti.AOTIModelContainerRunnerCuda(str(path), 1, device, "", True)
        else:
            runner = aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    except RuntimeError as error:
        raise IntegrityError(
            f"{path} cannot be loaded",
            expected="a library that PyTorch's compiler wrote",
            found=str(error)[:800],
            fix="build it again on this machine: `dvc repro`",
        ) from error
    names: Mapping[str, str] = runner.get_constant_names_to_original_fqns()
    if missing := sorted(set(names.values()) - set(weights)):
        raise IntegrityError(f"{path} has no weights for {', '.join(missing[:5])}")
    given = {inside: weights[name] for inside, name in names.items()}
    runner.update_constant_buffer(given, False, False, True)

    def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert given  # the library has their addresses alone
        found: list[torch.Tensor] = runner.run(list(inputs))
        return found

    return run
