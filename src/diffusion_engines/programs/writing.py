"""Write a network as an exported program.

What torch.export notes beyond the graph is left out (stack traces with the paths of this machine,
modules, sample inputs): the same network gives the same bytes anywhere.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_engines.errors import ExportError
from diffusion_engines.families.base import Component, TensorSpec
from diffusion_engines.programs.reading import (
    CONSTANTS,
    PROGRAM,
    quiet,
    serializer,
    torch_version,
)
from diffusion_engines.runtime.networks import (
    NetworkModule,
    example_inputs,
    network_from_config,
    precision_dtype,
    read_config,
)
from diffusion_engines.runtime.open_dims import shapes_of_dims, traceable

# Of a node: where it came from, which is another path on every machine.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def write_program(
    component: Component,
    network: Path,
    inputs: tuple[TensorSpec, ...],
    folder: Path,
    *,
    precision: str,
) -> None:
    """Write ``program.json``, and ``constants.safetensors`` where there are any, into ``folder``.

    Args:
        component: to export.
        network: the folder with its ``config.json``; its weights are not read.
        inputs: with open dimensions, if any.
        folder: gets the files.
        precision: of weights and inputs.

    Raises:
        ExportError: torch.export cannot trace the network.
    """
    from safetensors.torch import save_file

    module = _without_weights(component, network, precision)
    specs = tuple(traceable(spec) for spec in inputs)
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                module,
                example_inputs(specs, precision),
                # In a tuple once more: a component's module takes its inputs as *tensors.
                dynamic_shapes=(shapes_of_dims(specs),)
                if any(spec.dynamic for spec in specs)
                else None,
                strict=False,
            )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ExportError(
            f"torch.export cannot trace {component.name}",
            found=f"{type(error).__name__}: {str(error)[:800]}",
            fix="use a backend that takes ONNX, such as onnxruntime (conf/target/)",
        ) from error
    (folder / PROGRAM).write_bytes(_bytes_of(program))
    if constants := {name: value.clone() for name, value in program.constants.items()}:
        save_file(constants, folder / CONSTANTS)
        # safetensors keeps it from other users, who share a cache.
        (folder / CONSTANTS).chmod((folder / PROGRAM).stat().st_mode)


def _without_weights(component: Component, network: Path, precision: str) -> NetworkModule:
    """Return a component's network, its parameters not filled in.

    Memory that nobody has written costs nothing, however large the network is.
    """
    from accelerate import init_empty_weights

    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    config = read_config(component, network)
    dtype = precision_dtype(precision)
    # On the device "meta" initializing costs nothing; what a network computes has to be real.
    with init_empty_weights(include_buffers=False):
        made = network_from_config(component, config)
    module = NetworkModule(component, made).eval()
    for part in module.modules():
        for name, value in [*part.named_parameters(recurse=False)]:
            empty = torch.empty(value.shape, dtype=dtype)
            part.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in [*part.named_buffers(recurse=False)]:
            part._buffers[name] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return module


def _bytes_of(program: Any) -> bytes:
    for node in [*program.graph.nodes]:
        # They hold for the device of the export, and not for the one that it is compiled for.
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        for origin in _ORIGINS:
            node.meta.pop(origin, None)
    weights = {name: _described(value) for name, value in program.state_dict.items()}
    # The weights' places are taken by tensors without data.
    program._state_dict = {
        name: nn.Parameter(value.to("meta"), requires_grad=False)
        for name, value in program.state_dict.items()
    }
    inputs = [_described(value) for value in program.example_inputs[0]]
    program._example_inputs = None
    graph = json.loads(serializer().serialize(program).exported_program)
    graph["torch_version"] = torch_version()  # without the build's
    written = {"torch": torch_version(), "inputs": inputs, "weights": weights, "graph": graph}
    return json.dumps(written, separators=(",", ":")).encode()


def _described(value: torch.Tensor) -> dict[str, Any]:
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": [*value.shape]}
