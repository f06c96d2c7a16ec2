"""What a person types becomes what Hydra takes, whatever the prompt contains."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from diffusion_engines.arguments import hydra_arguments
from diffusion_engines.config import Generate

PROMPTS = [
    "A big banana leaf with lemons in front of it",
    "a leaf, and lemons",
    'l\'été = "warm", [x]{y}: (z) 50%',
    "back\\slash\\",
    "it\\'s",
    "${seed}",
    "null",
    "レモン",
    "",
]


def arguments(*given: str) -> list[str]:
    return hydra_arguments(given, {"target"}, "generate", Generate)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_as_it_was_typed(prompt: str) -> None:
    given = arguments(f"prompt={prompt}", f"negative_prompt={prompt}")
    overrides = OverridesParser.create().parse_overrides(given)
    values = {o.get_key_element(): o.value() for o in overrides}
    config: Any = OmegaConf.to_container(OmegaConf.create({"seed": 1, **values}))  # as a stage does
    assert config["generate.prompts"] == [prompt]
    assert config["generate.negative_prompt"] == prompt


def test_prompts_add_up_and_the_rest_goes_through() -> None:
    given = arguments("prompt=a", "target=cpu", "steps=30", "prompt=b", "image.height=64", "--help")
    assert given == [
        "+target=cpu",
        "generate.steps=30",
        "image.height=64",
        "--help",
        "generate.prompts=['a','b']",
    ]


def test_hydra_s_own_grammar_stays() -> None:
    own = ["+target=cpu", "generate.seed=3", "generate.prompts=[a,b]", "--cfg", "job"]
    assert arguments(*own) == own
    assert hydra_arguments(["steps=3"], {"engine"}, "build", None) == ["steps=3"]
