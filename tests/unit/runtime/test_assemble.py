"""PyTorch's networks run as a baseline asks for: precision, memory layout, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_engines.runtime.assemble import TorchNetwork, torch_networks
from diffusion_engines.runtime.networks import example_inputs
from tests.conftest import load


def test_channels_last_changes_the_layout_and_not_the_result(tiny_weights: Path) -> None:
    loaded = load(tiny_weights, "unet", "fp32")
    results = {}
    for channels_last in (False, True):
        networks = torch_networks(
            "fp32", "cpu", weights=tiny_weights, names=["unet"], channels_last=channels_last
        )
        weight = networks["unet"].module.network.conv_in.weight  # type: ignore[attr-defined]
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
        results[channels_last] = networks["unet"](*example_inputs(loaded.inputs, "fp32"))
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-4)


def test_what_is_compiled_is_the_module_in_the_mode_asked_for(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[Any, str]] = []

    def double(module: Any, *, mode: str) -> Any:
        compiled.append((module, mode))
        return module

    monkeypatch.setattr(torch, "compile", double)
    networks = torch_networks(
        "fp32", "cpu", weights=tiny_weights, names=["vae_decoder"], compile_mode="max-autotune"
    )
    network = networks["vae_decoder"]
    assert compiled == [(network.module, "max-autotune")]  # type: ignore[attr-defined]
    assert network.reuses_output  # type: ignore[attr-defined]


def test_results_outlive_the_next_call() -> None:
    class OneBuffer(torch.nn.Module):
        """Answers as a CUDA graph does: always in the same memory."""

        def __init__(self) -> None:
            super().__init__()
            self.buffer = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return self.buffer.copy_(value)

    network = TorchNetwork(OneBuffer(), ["component"], torch.float32, reuses_output=True)
    first, second = network(torch.tensor([1.0])), network(torch.tensor([2.0]))
    assert (float(first), float(second)) == (1.0, 2.0)
