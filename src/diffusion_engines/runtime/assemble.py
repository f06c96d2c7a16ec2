"""Put together the networks of a pipeline: engines where a target has them, PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_engines import manifests
from diffusion_engines.families import family_of
from diffusion_engines.families.base import Dtype, Network
from diffusion_engines.layout import Workspace
from diffusion_engines.progress import step
from diffusion_engines.runtime.bundle import load_bundle
from diffusion_engines.runtime.networks import load_network, precision_dtype, tensor_dtype


@dataclass(frozen=True)
class TorchNetwork:
    """A PyTorch network that takes inputs of any dtype, as engines do.

    Attributes:
        module: the network.
        dtypes: of its inputs, as its component declares them.
        dtype: what "component" stands for among them.
        autocast: whether each call runs under ``torch.autocast`` to fp16.
        reuses_output: whether the module writes its result where the last one is: CUDA graphs do
            (torch.compile).
    """

    module: torch.nn.Module
    dtypes: Sequence[Dtype]
    dtype: torch.dtype
    autocast: bool = False
    reuses_output: bool = False

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Run the network, on inputs cast to what it declares."""
        cast = (
            tensor.to(tensor_dtype(dtype, self.dtype))
            for tensor, dtype in zip(tensors, self.dtypes, strict=True)
        )
        device = next(self.module.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, torch.float16, enabled=self.autocast):
            output = self.module(*cast)
        if not self.reuses_output:
            return output
        return (
            output.clone() if isinstance(output, torch.Tensor) else tuple(map(torch.clone, output))
        )


def torch_networks(
    precision: str,
    device: str,
    *,
    weights: Path,
    names: Iterable[str] | None = None,
    autocast: bool = False,
    compile_mode: str | None = None,
    channels_last: bool = False,
) -> dict[str, Network]:
    """Load components as PyTorch modules, after checking their files; all where none are named.

    Args:
        precision: of weights and inputs.
        device: where they run.
        weights: a diffusers folder.
        names: the components.
        autocast: run each call under ``torch.autocast`` to fp16.
        compile_mode: of ``torch.compile``; the first calls compile, which takes minutes.
        channels_last: convolutions' weights in that layout, which tensor cores prefer.

    Raises:
        IntegrityError: a weights file is damaged.
        ConfigError: the model has no such component.
    """
    family = family_of(weights)
    networks: dict[str, Network] = {}
    for name in family.components if names is None else names:
        component = family.component(name)
        folder = weights / component.folder
        with step(f"load {name} in PyTorch, {precision}"):
            manifests.read(folder, manifests.Weights)
            module: Any = load_network(component, folder, precision, device)
            if channels_last:
                module = module.to(memory_format=torch.channels_last)
            if compile_mode is not None:
                module = torch.compile(module, mode=compile_mode)
        networks[name] = TorchNetwork(
            module,
            [value.dtype for value in component.takes],
            precision_dtype(precision),
            autocast,
            reuses_output=compile_mode is not None,
        )
    return networks


def engine_networks(
    target: str, names: Iterable[str], device: str, *, workspace: Workspace
) -> dict[str, Network]:
    """Load the engines of a target.

    Raises:
        IntegrityError, FingerprintError, HardwareError: as of :func:`load_bundle`.
    """
    networks: dict[str, Network] = {}
    for name in names:
        with step(f"load engine {target}-{name}"):
            networks[name] = load_bundle(workspace.bundle(target, name), device)
    return networks


def target_networks(
    target: str,
    components: Mapping[str, str],
    device: str,
    *,
    workspace: Workspace,
    torch_precision: str = "fp32",
) -> dict[str, Network]:
    """Load a target's engines, and PyTorch networks for the components that it has none for."""
    weights = workspace.weights
    missing = [name for name in family_of(weights).components if name not in components]
    return {
        **engine_networks(target, components, device, workspace=workspace),
        **torch_networks(torch_precision, device, weights=weights, names=missing),
    }
