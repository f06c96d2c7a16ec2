"""Read an exported program, to compile it."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_engines.errors import BuildError

PROGRAM = "program.json"
# Tensors that a network computes when it is made, such as position ids; most have none.
CONSTANTS = "constants.safetensors"


def read_program(folder: Path, *, channels_last: bool) -> Any:
    """Return a program (``torch.export.ExportedProgram``) on the CPU, to be compiled.

    Every weight is NaN: a compiler that takes a value of one for granted, as Inductor does with
    biases of up to eight elements, builds an engine that gives nothing else, instead of one that is
    a little wrong.

    Args:
        folder: of the program.
        channels_last: give weights of four dimensions that layout.

    Raises:
        BuildError: the program is of another version of PyTorch.
    """
    written = json.loads((folder / PROGRAM).read_bytes())
    _check_version(written["torch"])
    weights = {
        name: nn.Parameter(_nan(value, channels_last=channels_last), requires_grad=False)
        for name, value in written["weights"].items()
    }
    inputs = tuple(
        torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]))
        for value in written["inputs"]
    )
    graph = json.dumps(written["graph"]).encode()
    serialize = serializer()
    artifact = serialize.SerializedArtifact(
        graph, weights, dict(constants_of(folder)), (inputs, {})
    )
    with quiet():
        return serialize.deserialize(artifact)


def constants_of(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the constants of a program, by their names in the network."""
    from safetensors.torch import load_file

    path = folder / CONSTANTS
    return load_file(path) if path.is_file() else {}


def torch_version() -> str:
    """Return PyTorch's version without the build's, which no program depends on."""
    return torch.__version__.split("+")[0]


def serializer() -> Any:
    """Return PyTorch's module that turns programs into JSON."""
    # torch.export.save writes the weights too, and the sample inputs as a pickle.
    return importlib.import_module("torch._export.serde.serialize")


def _check_version(written: str) -> None:
    if (here := torch_version()) != written:
        raise BuildError(
            "the exported program is of another version of PyTorch",
            expected=here,
            found=written,
            fix="export it here: `dvc repro` does where this machine's fingerprint is recorded",
        )


def _nan(value: Mapping[str, Any], *, channels_last: bool) -> torch.Tensor:
    shape, dtype = value["shape"], getattr(torch, value["dtype"])
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    return torch.full(shape, torch.nan, dtype=dtype).contiguous(memory_format=layout)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what PyTorch says about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
