"""Run an engine of PyTorch's compiler, after comparing its fingerprint with this machine."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from diffusion_engines.backends.inductor.fingerprint import running_fingerprint
from diffusion_engines.backends.inductor.library import Run, open_library
from diffusion_engines.backends.inductor.settings import LAYOUT, WEIGHTS
from diffusion_engines.backends.preflight import rebuild, recorded
from diffusion_engines.backends.targets import recorded_device
from diffusion_engines.errors import ConfigError, FingerprintError
from diffusion_engines.files import read_json
from diffusion_engines.manifests import Engine
from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.programs.reading import constants_of
from diffusion_engines.runtime.cuda_graphs import capture

# Recorded graphs that are kept, one for the sizes of each kind of call.
_GRAPHS = 8


def check_loadable(manifest: Engine) -> None:
    """Compare an engine's fingerprint with this machine.

    Raises:
        FingerprintError: they differ.
        HardwareError: there is no GPU.
    """
    for key, here in running_fingerprint(recorded_device(manifest)).items():
        if (built := recorded(manifest, "fingerprint", key, str)) != here:
            raise FingerprintError(
                f"the engine {manifest.name} was built for another {key.replace('_', ' ')}",
                expected=built,
                found=here,
                fix=f"build it here: {rebuild(manifest)}",
            )


def load(folder: Path, manifest: Engine, *, cuda_graph: bool = False) -> nn.Module:
    """Return the engine as a module that takes and returns tensors on the device of its build.

    On a GPU each call is recorded as a CUDA graph where the target says so (``build.cuda_graph``)
    or ``cuda_graph`` asks for it.

    Raises:
        ConfigError: a CUDA graph is asked for on a CPU.
        IntegrityError: the library cannot be loaded, or weights are missing.
    """
    device = recorded_device(manifest)
    if cuda_graph and device == "cpu":
        raise ConfigError(
            f"the engine {manifest.name} is for a CPU, which has no CUDA graphs",
            expected="cuda_graph=False",
            found="cuda_graph=True",
        )
    run = open_library(folder / manifest.engine, device, _weights(folder, device))
    recorded_calls = device == "cuda" and recorded(manifest, "settings", "build.cuda_graph", bool)
    return InductorEngine(run, _input_dtypes(manifest), device, cuda_graph or recorded_calls)


class InductorEngine(nn.Module):
    """Runs a library; casts inputs to the dtypes that it was compiled for.

    Attributes:
        capturable: whether a call can be a part of a larger CUDA graph.
    """

    def __init__(
        self, run: Run, dtypes: Sequence[torch.dtype], device: str, cuda_graph: bool
    ) -> None:
        super().__init__()
        self.run = run
        self.dtypes = tuple(dtypes)
        self.device = torch.device(device)
        self.cuda_graph = cuda_graph
        self.capturable = device == "cuda"
        self.graphs: dict[tuple[torch.Size, ...], RecordedCall] = {}
        self.lock = (
            threading.Lock()
        )  # a library runs, and a graph is replayed, in memory of its own

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Return the output, or a tuple of several."""
        cast = [
            tensor.to(self.device, dtype).contiguous()
            for tensor, dtype in zip(tensors, self.dtypes, strict=True)
        ]
        with torch.no_grad(), self.lock:
            outputs = self._recorded(cast) if self._records() else self.run(cast)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _records(self) -> bool:
        # A call inside of somebody else's recording becomes a part of that.
        return self.cuda_graph and not torch.cuda.is_current_stream_capturing()

    def _recorded(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        sizes = tuple(tensor.shape for tensor in inputs)
        if sizes not in self.graphs:
            if len(self.graphs) == _GRAPHS:
                self.graphs.pop(next(iter(self.graphs)))
            self.graphs[sizes] = RecordedCall(self.run, inputs)
        return self.graphs[sizes](inputs)


class RecordedCall:
    """One call as a CUDA graph, for inputs of the sizes that it was recorded with."""

    def __init__(self, run: Run, inputs: Sequence[torch.Tensor]) -> None:
        self.run = run  # the graph works in its library's memory
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph, self.outputs = capture(functools.partial(run, self.inputs))

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Replay it on these inputs; the results are copies, which the next call leaves alone."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return [output.clone() for output in self.outputs]


def _weights(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """Return weights and constants on the device, in the layout that the library takes."""
    given = load_file(folder / WEIGHTS, device=device)
    weights = {}
    for name, value in read_json(folder / LAYOUT).items():
        parts = [given.pop(part) for part in value.get("parts", [name])]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        weights[name] = _strided(whole, value["stride"])
    return weights | {name: value.to(device) for name, value in constants_of(folder).items()}


def _strided(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    if [*tensor.stride()] == [*stride]:
        return tensor  # as it is mapped
    return torch.empty_strided(
        tuple(tensor.shape), tuple(stride), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def _input_dtypes(manifest: Engine) -> list[torch.dtype]:
    own = PRECISIONS[manifest.precision].torch_dtype
    return [
        getattr(torch, str(own) if value.dtype == "component" else value.dtype)
        for value in manifest.inputs
    ]
