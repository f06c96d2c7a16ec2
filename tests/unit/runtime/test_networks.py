"""Configs are read with the defaults of their classes; a module takes tensors and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusion_engines.families import family_of
from diffusion_engines.families.base import TensorSpec
from diffusion_engines.runtime.assemble import TorchNetwork
from diffusion_engines.runtime.networks import (
    example_inputs,
    load_network,
    network_from_config,
    read_config,
)
from diffusion_engines.weights.sources import fill_with_random_weights
from tests.conftest import COMPONENTS, ROOT, TINY, load
from tests.models import MODELS, section


@pytest.mark.parametrize("model", MODELS)
def test_a_config_has_what_its_network_has(model: str) -> None:
    folder = ROOT / section(model, "model")["folder"]
    for component in family_of(folder).components.values():
        published = json.loads((folder / component.folder / "config.json").read_text())
        with torch.device("meta"):
            network = network_from_config(component, published)
        theirs = network.config if isinstance(network.config, dict) else network.config.to_dict()
        found = read_config(component, folder / component.folder)
        for key in set(theirs) - {"_use_default_values", "_name_or_path", "_class_name"}:
            assert found[key] == theirs[key] or list(found[key]) == list(theirs[key]), key


def test_published_values_stand_and_missing_ones_are_the_classes(tmp_path: Path) -> None:
    published = json.loads((ROOT / "conf/architecture/sdxl/vae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**published, "_diffusers_version": "0.2.2"}))
    config = read_config(COMPONENTS["vae_decoder"], tmp_path)
    assert (config["scaling_factor"], config["use_quant_conv"]) == (0.13025, True)
    assert config["_diffusers_version"] == "0.2.2"  # which diffusers' pipelines look at
    del published["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_config(COMPONENTS["vae_decoder"], tmp_path)["scaling_factor"] == 0.18215


def test_random_weights_leave_the_published_configs_alone(tmp_path: Path) -> None:
    fill_with_random_weights(TINY, tmp_path, seed=0, dtype="fp16")
    for component in COMPONENTS.values():
        published = TINY / component.folder / "config.json"
        copy = tmp_path / component.folder / "config.json"
        assert copy.read_bytes() == published.read_bytes()
        module = load_network(component, copy.parent, "fp16")
        assert {value.dtype for value in module.parameters()} == {torch.float16}


def test_integers_of_an_unknown_range_are_those_that_any_embedding_has() -> None:
    specs = (TensorSpec("input_0", "class labels", "int64", (64,)),)
    (labels,) = example_inputs(specs, "fp32")
    assert set(labels.tolist()) == {0}
    (tokens,) = example_inputs(specs, "fp32", vocabulary=1000)
    assert 500 < tokens.max() < 1000


def test_the_decoder_carries_no_weights_of_the_encoding_half(tiny_weights: Path) -> None:
    names = [name for name, _ in load(tiny_weights, "vae_decoder").module.named_parameters()]
    assert {name.split(".")[1] for name in names} == {"decoder", "post_quant_conv"}
    assert "network.decoder.conv_in.weight" in names  # as conf/quantize/ names layers


def test_casts_follow_the_declared_dtype_and_not_the_number_of_dimensions() -> None:
    class Noting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            self.dtypes = [tensor.dtype for tensor in tensors]
            return tensors[0]

    module = Noting()
    network = TorchNetwork(module, ["component", "float32", "int64"], torch.float16)
    for shape in ((2,), (2, 3), (2, 3, 4, 5)):
        network(torch.ones(shape), torch.ones(shape).double(), torch.ones(shape).int())
        assert module.dtypes == [torch.float16, torch.float32, torch.int64]
    with pytest.raises(ValueError, match="zip"):
        network(torch.ones(1))
