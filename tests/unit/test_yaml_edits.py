"""One value of a YAML file changes; comments and layout stay."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from diffusion_engines.yaml_edits import with_value

FLEET = """\
# @package _global_
# A fleet.
defaults:
  - /target@targets.cpu: cpu   # which
  - /precision@fleet.cpu: fp32
fleet:
  cpu: {only: [unet]}   # not all
export:
  opset: 18  # the exporter's own

  patches: []
measure: [cpu]                 # targets
"""


@pytest.mark.parametrize(
    ("path", "value", "lines"),
    [
        (["export", "opset"], 20, ["  opset: 20  # the exporter's own"]),
        (["defaults", "1", "/precision@fleet.cpu"], "fp16", ["  - /precision@fleet.cpu: fp16"]),
        (["defaults", "0", "/target@targets.cpu"], "a", ["  - /target@targets.cpu: a   # which"]),
        (["export", "patches"], ["a", "b"], ["  patches: [a, b]"]),
        (["export", "exporter"], "dynamo", ["  exporter: dynamo"]),
        (["fleet", "cpu", "precision"], "p", ["  cpu: {only: [unet], precision: p}   # not all"]),
        (["fleet", "cpu", "components", "unet"], "fp8",
         ["  cpu: {only: [unet], components: {unet: fp8}}   # not all"]),
        (["targets", "cpu", "level"], "on", ["targets:", "  cpu:", '    level: "on"']),
        (["measure"], [], ["measure: []                 # targets"]),
    ],
)  # fmt: skip
def test_only_the_value_changes(path: list[str], value: Any, lines: list[str]) -> None:
    changed = with_value(FLEET, path, value)
    before, after = FLEET.splitlines(), changed.splitlines()
    assert [line for line in after if line not in before] == lines
    assert len(after) - len(before) in (0, len(lines))
    assert [line for line in before if line not in after] == [] or len(before) == len(after)
    found: Any = OmegaConf.to_container(OmegaConf.create(changed))
    for key in path:
        found = found[int(key)] if isinstance(found, list) else found[key]
    assert found == value


@pytest.mark.parametrize(
    "value", [1e-5, 0.25, 3, True, None, "1.10", "no", "with: colon", "${.folder}", "", "1e3"]
)
def test_a_value_is_read_as_it_was_given(value: Any) -> None:
    for text in ("# mine\n", "a: 1\n", "a: 1", "a:\n", "b: {}\n", ""):
        changed = with_value(text, ["a"], value)
        assert OmegaConf.to_container(OmegaConf.create(changed)) == {
            **(yaml.safe_load(text) or {}),
            "a": value,
        }
        assert yaml.safe_load(changed)["a"] == value


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(KeyError, match="deeper"):
        with_value(FLEET, ["export", "opset", "deeper"], 1)
