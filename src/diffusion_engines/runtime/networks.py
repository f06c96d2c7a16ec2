"""The PyTorch networks, each as a module with the inputs and outputs of its component."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_engines.errors import WeightsError
from diffusion_engines.families.base import Component, Dtype, TensorSpec
from diffusion_engines.precisions import PRECISIONS

_GET_AGAIN = "get the model again, or correct the file: docs/models.md says what is taken"


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


def network_from_config(component: Component, config: Mapping[str, Any]) -> Any:
    """Return a component's network with the weights that PyTorch's initialization gives it.

    On the device and in the dtype that are PyTorch's defaults at the time: under
    ``torch.device("meta")``, it costs nothing and has names and shapes alone.
    """
    cls = network_class(component)
    if component.library == "transformers":
        return cls(cls.config_class.from_dict(dict(config)))
    return cls.from_config(dict(config))


def read_config(component: Component, folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a network as its library reads it.

    Keys that the file lacks have the defaults of the network's class: configs of 2022 lack what
    came later.

    Args:
        component: whose class has the defaults.
        folder: with the file, e.g. ``artifacts/weights/unet``.

    Raises:
        WeightsError: the file is missing, or is no JSON object, or the class cannot read it.
    """
    published = read_object(folder / "config.json")
    cls = network_class(component)
    try:
        if component.library == "transformers":
            config: dict[str, Any] = cls.config_class.from_dict(dict(published)).to_dict()
            return config
        known, _, rest = cls.extract_init_dict(published)
    except Exception as error:  # of whichever kind the library's checks of types are
        raise WeightsError(
            f"{folder / 'config.json'} is no config of a {component.class_name}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix=_GET_AGAIN,
        ) from error
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    config = {**defaults, **rest, **known}
    return config if component.derived is None else {**config, **component.derived(config)}


def read_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file of a model holds.

    Raises:
        WeightsError: the file is missing, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing", fix=_GET_AGAIN) from error
    except (OSError, ValueError) as error:  # no UTF-8 is a ValueError, too
        raise WeightsError(
            f"{path} is not JSON", found=f"{type(error).__name__}: {error}", fix=_GET_AGAIN
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} is no config", expected="an object", found=type(content).__name__
        )
    return content


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
    named: torch.dtype = component if dtype == "component" else getattr(torch, dtype)
    return named


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
