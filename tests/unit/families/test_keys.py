"""Every key of a config has its place: what is computed follows it, or it is refused, or idle."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch

from diffusion_engines.families import FAMILIES
from diffusion_engines.families.base import Component, Family, Keys
from diffusion_engines.families.noise_schedules import SOLVING, TRAINED
from diffusion_engines.runtime.networks import (
    NetworkModule,
    example_inputs,
    network_class,
    network_from_config,
    read_config,
)
from tests.conftest import COMPONENTS, IMAGE, ROOT, STATIC, TINY

# What libraries and pipelines look up in a config beyond the parameters of its class.
LOOKED_UP = {
    "transformers": {"model_type", "use_attention_mask", "output_attentions"},
    "diffusers": set[str](),
}
NETWORKS = {
    f"{family.class_name}.{name}.{variant.class_name}": variant
    for family in FAMILIES.values()
    for name, component in family.components.items()
    for variant in (component, *component.variants)
}


def parameters(cls: Any) -> dict[str, Any]:
    """Return the parameters of a class with their defaults."""
    found = inspect.signature(cls.__init__).parameters
    return {name: value.default for name, value in found.items() if name != "self"}


def places(keys: Keys | None) -> set[str]:
    assert keys is not None
    every = [*keys.honoured, *keys.only, *keys.idle]
    assert len(every) == len({*every}), "a key has two places"
    return {*every}


@pytest.mark.parametrize("component", NETWORKS.values(), ids=NETWORKS)
def test_every_key_of_a_network_has_one_place(component: Component) -> None:
    cls = network_class(component)
    transformers = component.library == "transformers"
    if transformers:
        known = {field.name: field.default for field in dataclasses.fields(cls.config_class)}
    else:
        known = parameters(cls)
    beyond = {"quantization_config"} | LOOKED_UP[component.library]
    assert places(component.keys) == {*known} | beyond
    assert component.keys
    for key, only in component.keys.only.items():
        # A key that is left out passes; but for what makes the kind of pipeline.
        if key in known and key != "addition_embed_type":
            assert known[key] in only.values, key


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_key_of_an_index_has_one_place(family: Family) -> None:
    modules = {*family.folders}
    known = parameters(getattr(diffusers, family.class_name))
    assert places(family.keys) | modules == {*known}
    assert not places(family.keys) & modules


@pytest.mark.parametrize("component", NETWORKS.values(), ids=NETWORKS)
def test_the_guide_lists_every_key_that_is_refused(component: Component) -> None:
    page = (ROOT / "docs/models.md").read_text()
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| ")]
    assert component.keys
    for key, only in component.keys.only.items():
        taken = [
            values
            for classes, keys, values in rows
            if f"`{key}`" in keys and (f"`{component.class_name}`" in classes or "every" in classes)
        ]
        assert len(taken) == 1, key
        for value in only.values:
            written = (
                "null" if value is None else "0" if value == 0.0 and value is not False else value
            )
            assert f"`{written}`" in taken[0], (key, value)


def test_every_key_of_a_noise_schedule_is_of_training_or_of_solving() -> None:
    found: set[str] = set()
    for family in FAMILIES.values():
        for scheduler in family.schedulers.values():
            found |= {*parameters(getattr(diffusers, scheduler.class_name))}
    assert not SOLVING & {*TRAINED}
    # None of these solvers has sigma_data, by which others are known.
    assert SOLVING | {*TRAINED} == found | {"sigma_data"}


IDLE: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "sample_size": 99,
        "dropout": 0.5,
        "addition_time_embed_dim": 7,
        "projection_class_embeddings_input_dim": 11,
        "addition_embed_type_num_heads": 3,
    },
    "vae_decoder": {
        "in_channels": 5,
        "down_block_types": ["AttnDownEncoderBlock2D"] * 4,
        "use_quant_conv": False,
        "sample_size": 99,
        "force_upcast": False,
    },
    "text_encoder": {
        "attention_dropout": 0.5,
        "initializer_range": 1.0,
        "initializer_factor": 9.0,
        "chunk_size_feed_forward": 2,
        "is_encoder_decoder": True,
        "problem_type": "regression",
        "id2label": {"0": "a"},
        "label2id": {"a": 0},
        "architectures": ["Others"],
        "transformers_version": "1.0",
        "dtype": "float16",
        "pad_token_id": 7,
        "bos_token_id": 8,
        "output_hidden_states": True,
    },
    "tiny": {
        "in_channels": 5,
        "encoder_block_out_channels": [8] * 3,
        "num_encoder_blocks": [1] * 3,
        "latent_magnitude": 9,
        "latent_shift": 0.1,
        "force_upcast": True,
    },
}


@pytest.mark.parametrize("name", IDLE)
def test_idle_keys_change_nothing(name: str) -> None:
    if name == "tiny":
        (component,) = COMPONENTS["vae_decoder"].variants
        config: dict[str, Any] = {
            "decoder_block_out_channels": [8] * 4,
            "encoder_block_out_channels": [8] * 4,
        }
    else:
        component = COMPONENTS[name]
        config = json.loads((TINY / component.folder / "config.json").read_text())
    assert component.keys
    assert component.keys.idle == {*IDLE[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        changed = {**config, **IDLE[name]}
        networks = [network_from_config(component, value) for value in (config, changed)]
    modules = [NetworkModule(component, network).eval() for network in networks]
    modules[1].load_state_dict(modules[0].state_dict())  # of the same names and shapes
    full = config if name == "tiny" else read_config(component, TINY / component.folder)
    inputs = component.inputs({"latent_channels": 4, **full}, IMAGE, STATIC)
    tensors = example_inputs(inputs, "fp32", vocabulary=500)
    with torch.no_grad():
        expected, found = (module(*tensors) for module in modules)
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
