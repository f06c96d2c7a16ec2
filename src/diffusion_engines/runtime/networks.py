"""The PyTorch networks, each as a module with the inputs and outputs of its component."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_engines.families.base import Component, Dtype, TensorSpec
from diffusion_engines.precisions import PRECISIONS


class NetworkModule(nn.Module):
    """A component's network, called with tensors alone, as an engine is."""

    def __init__(self, component: Component, network: Any) -> None:
        super().__init__()
        if component.prepare is not None:
            component.prepare(network)
        self.network = network
        self.call = component.call

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Return the output, or a tuple of several, of the component's inputs."""
        return self.call(self.network, *tensors)


def network_class(component: Component) -> Any:
    """Return the class of diffusers or transformers that holds a component."""
    return getattr(importlib.import_module(component.library), component.class_name)


def read_config(component: Component, folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a network as its library reads it.

    Keys that the file lacks have the defaults of the network's class: configs of 2022 lack what
    came later.

    Args:
        component: whose class has the defaults.
        folder: with the file, e.g. ``artifacts/weights/unet``.
    """
    published = json.loads((folder / "config.json").read_text())
    cls = network_class(component)
    if component.library == "transformers":
        return cls.config_class.from_dict(published).to_dict()
    known, _, rest = cls.extract_init_dict(published)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return {**defaults, **rest, **known}


def load_network(
    component: Component, folder: Path, precision: str, device: str = "cpu"
) -> NetworkModule:
    """Load a component from safetensors, in ``precision``, for inference.

    Weights are cast tensor by tensor, so that the peak is one model in ``precision``.
    """
    # A stage has progress lines of its own.
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    key = "torch_dtype" if component.library == "diffusers" else "dtype"
    network = network_class(component).from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        low_cpu_mem_usage=True,
        **{key: precision_dtype(precision)},
    )
    return NetworkModule(component, network).eval().requires_grad_(False).to(device)


def precision_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a precision's inputs and outputs.

    Raises:
        ValueError: that is the dtype of what the graph was made from, as for int8.
    """
    name = PRECISIONS[precision].torch_dtype
    if name is None:
        raise ValueError(f"{precision} has no dtype of its own")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def tensor_dtype(dtype: Dtype, component: torch.dtype) -> torch.dtype:
    """Return the dtype of an input; ``component`` is what "component" stands for."""
    return {"component": component, "float32": torch.float32, "int64": torch.int64}[dtype]


def example_inputs(
    specs: tuple[TensorSpec, ...], precision: str, *, vocabulary: int = 0, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Return seeded inputs of the right shapes and dtypes: noise, a timestep, token ids.

    Sizes are those of a picture of 512×512 pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in specs:
        if spec.dtype == "int64":
            tensors.append(torch.randint(max(vocabulary, 1), spec.size, generator=generator))
        elif spec.role == "timestep":
            tensors.append(torch.full(spec.size, 999.0))
        elif spec.role == "sizes":
            size = torch.tensor([512.0, 512.0, 0.0, 0.0, 512.0, 512.0])
            tensors.append(size.repeat(spec.size[0], 1))
        else:
            dtype = tensor_dtype(spec.dtype, precision_dtype(precision))
            tensors.append(torch.randn(spec.size, generator=generator).to(dtype))
    return tuple(tensors)
