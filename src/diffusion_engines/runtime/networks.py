"""The PyTorch networks, each as a module with the inputs of its ``ComponentSpec``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_engines.components import ComponentSpec, TensorSpec

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "int64": torch.int64,
}


class TextEncoder(nn.Module):
    """Token ids (batch, 77) to the last hidden state (batch, 77, hidden)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the network; shapes as above."""
        return self.network(input_ids=input_ids, return_dict=False)[0]


class PenultimateTextEncoder(nn.Module):
    """Token ids (batch, 77) to the hidden state before the last layer (batch, 77, hidden)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the network; shapes as above."""
        return self.network(input_ids=input_ids, output_hidden_states=True).hidden_states[-2]


class ProjectedTextEncoder(nn.Module):
    """Token ids (batch, 77) to the penultimate hidden state and the pooled embedding.

    These are (batch, 77, hidden) and (batch, projection).
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the network; shapes as above."""
        result = self.network(input_ids=input_ids, output_hidden_states=True)
        return result.hidden_states[-2], result.text_embeds


class UNet(nn.Module):
    """Latents (batch, 4, h, w), timestep (1,), text (batch, 77, c) to noise (batch, 4, h, w)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        """Run the network; shapes as above."""
        batched = timestep.expand(latents.shape[0])
        return self.network(latents, batched, text, return_dict=False)[0]


class ConditionedUNet(nn.Module):
    """SDXL's UNet: as :class:`UNet`, with a pooled embedding (batch, p) and sizes (batch, 6)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        sizes: torch.Tensor,
    ) -> torch.Tensor:
        """Run the network; shapes as above."""
        batched = timestep.expand(latents.shape[0])
        # The network puts the pooled embedding beside sinusoids of the sizes, which are fp32.
        # PyTorch promotes; the exporter would write a Concat of two types, which is invalid.
        conditions = {"text_embeds": pooled.to(sizes.dtype), "time_ids": sizes}
        return self.network(
            latents, batched, text, added_cond_kwargs=conditions, return_dict=False
        )[0]


class VAEDecoder(nn.Module):
    """Latents (batch, 4, h, w), unscaled, to images (batch, 3, 8 h, 8 w) around [-1, 1]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        # Only the decoding half, so that no export carries the encoder's weights.
        self.post_quant_conv = network.post_quant_conv or nn.Identity()
        self.decoder = network.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Run the network; shapes as above."""
        return self.decoder(self.post_quant_conv(latents))


_MODULES = {
    module.__name__: module
    for module in (
        TextEncoder,
        PenultimateTextEncoder,
        ProjectedTextEncoder,
        UNet,
        ConditionedUNet,
        VAEDecoder,
    )
}


def network_class(spec: ComponentSpec) -> Any:
    """Return the class of diffusers or transformers that holds a component."""
    return getattr(importlib.import_module(spec.library), spec.class_name)


def load_architecture(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of one network of a diffusers model."""
    return json.loads((folder / "config.json").read_text())


def load_network(
    spec: ComponentSpec, folder: Path, precision: str, device: str = "cpu"
) -> nn.Module:
    """Load a component from safetensors, in ``precision``, for inference.

    Weights are cast tensor by tensor, so that the peak is one model in ``precision``.
    """
    # A stage has progress lines of its own.
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    dtype = {"torch_dtype" if spec.library == "diffusers" else "dtype": _DTYPES[precision]}
    network = network_class(spec).from_pretrained(
        folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=True, **dtype
    )
    module = _MODULES[spec.module](network)
    return module.eval().requires_grad_(False).to(device)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a precision, or of a :class:`TensorSpec`."""
    return _DTYPES[name]


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
            tensors.append(torch.randint(vocabulary, spec.size, generator=generator))
        elif spec.role == "timestep":
            tensors.append(torch.full(spec.size, 999.0))
        elif spec.role == "sizes":
            size = torch.tensor([512.0, 512.0, 0.0, 0.0, 512.0, 512.0])
            tensors.append(size.repeat(spec.size[0], 1))
        else:
            dtype = _DTYPES[precision if spec.dtype == "component" else spec.dtype]
            tensors.append(torch.randn(spec.size, generator=generator).to(dtype))
    return tuple(tensors)
