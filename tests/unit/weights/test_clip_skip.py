"""Text encoders without their last layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

from diffusion_engines.errors import ConfigError
from diffusion_engines.weights.check import count_parameters
from diffusion_engines.weights.clip_skip import leave_out_last_layers


def test_it_is_the_earlier_hidden_state_normed_as_the_last_one(weights_copy: Path) -> None:
    # As StableDiffusionPipeline.encode_prompt has it; in diffusers 0.42.1 that line looks for the
    # norm where transformers 5 does not keep it any more.
    folder = weights_copy / "text_encoder"
    whole = CLIPTextModel.from_pretrained(folder)
    tokens = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(0))
    states = whole(tokens, output_hidden_states=True)
    expected = whole.final_layer_norm(states.hidden_states[-2])
    before = count_parameters(folder)

    leave_out_last_layers(folder, 1)

    found = CLIPTextModel.from_pretrained(folder)(tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, states.last_hidden_state)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    layer = sum(parameter.numel() for parameter in whole.encoder.layers[1].parameters())
    assert count_parameters(folder) == before - layer


def test_something_has_to_be_left(weights_copy: Path) -> None:
    with pytest.raises(ConfigError, match="expected: fewer than its 2 layers"):
        leave_out_last_layers(weights_copy / "text_encoder", 2)
    assert count_parameters(weights_copy / "text_encoder")
