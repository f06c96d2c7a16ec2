"""Put together the networks of a pipeline: engines where a target has them, PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.components import pipeline_of
from diffusion_engines.config import Engine
from diffusion_engines.files import read_manifest
from diffusion_engines.layout import Workspace
from diffusion_engines.progress import step
from diffusion_engines.runtime.bundle import load_bundle
from diffusion_engines.runtime.conditioning import Network
from diffusion_engines.runtime.networks import load_network, torch_dtype


@dataclass(frozen=True)
class TorchNetwork:
    """A PyTorch network that takes any floating-point input, as engines do."""

    module: torch.nn.Module
    dtype: torch.dtype
    autocast: bool = False
    # The module writes its result where the last one is: CUDA graphs do (torch.compile).
    reuses_output: bool = False

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Run the network; timesteps, sizes, token ids and the pooled embedding keep their dtype.

        The network itself casts the last of these.
        """
        cast = (t.to(self.dtype) if t.ndim > 2 else t for t in tensors)
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
    pipeline = pipeline_of(weights)
    networks: dict[str, Network] = {}
    for name in pipeline.components if names is None else names:
        spec = pipeline.component(name)
        with step(f"load {name} in PyTorch, {precision}"):
            read_manifest(weights / spec.folder, "weights")
            module: Any = load_network(spec, weights / spec.folder, precision, device)
            if channels_last:
                module = module.to(memory_format=torch.channels_last)
            if compile_mode is not None:
                module = torch.compile(module, mode=compile_mode)
        networks[name] = TorchNetwork(
            module, torch_dtype(precision), autocast, reuses_output=compile_mode is not None
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


def engine_components(target: str, engines: Mapping[str, Engine]) -> dict[str, str]:
    """Return the components that a target has engines for, with their precisions."""
    return {e.component: e.precision for e in engines.values() if e.target == target}


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
    missing = [name for name in pipeline_of(weights).components if name not in components]
    return {
        **engine_networks(target, components, device, workspace=workspace),
        **torch_networks(torch_precision, device, weights=weights, names=missing),
    }
