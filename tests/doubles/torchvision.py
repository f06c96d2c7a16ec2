"""A test double of the little that LPIPS takes of torchvision: AlexNet's layers, and its weights.

The layers are those of torchvision 0.28's ``models/alexnet.py``; weights are read through
``torch.hub``, as there. No build of torchvision for a CPU is on PyPI.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from torch import nn


def alexnet_features() -> nn.Sequential:
    """The convolutional half of AlexNet."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


def torchvision_double(weights: str) -> ModuleType:
    """A module ``torchvision`` whose AlexNet has weights under a name of the test's."""
    url = f"http://127.0.0.1:9/{weights}"  # where nothing listens

    def alexnet(weights: SimpleNamespace | None) -> nn.Module:
        network = nn.ModuleDict({"features": alexnet_features()})
        if weights is not None:
            network.load_state_dict(torch.hub.load_state_dict_from_url(weights.url))
        return network

    module = ModuleType("torchvision")
    module.models = SimpleNamespace(  # type: ignore[attr-defined]
        AlexNet_Weights=SimpleNamespace(DEFAULT=SimpleNamespace(url=url)), alexnet=alexnet
    )
    return module
