"""dvc.lock is read fast, and as DVC reads it."""

from __future__ import annotations

import math

import pytest
import yaml
from dvc.utils.serialize import parse_yaml

from diffusion_engines.plan.reading import parse_yaml_12
from tests.conftest import ROOT

SCALARS = """\
- 1e-05
- 1.0e-05
- 1e3
- -2.5E+4
- .5
- 1.10
- '1.10'
- 8.9
- on
- yes
- n
- true
- False
- null
- ~
-
- ''
- 0
- 42
- -7
- 12:30:45
- 123e45678901234567890123456789ab
- 12345678901234567890123456789012.dir
- [explicit_attention, "a: b"]
- {a: 1, b: {c: 0.0001}}
- "A lemon\\nü"
- .inf
"""


@pytest.mark.parametrize("file", ["params.yaml", "dvc.yaml"])
def test_files_are_read_as_dvc_reads_them(file: str) -> None:
    text = (ROOT / file).read_text()
    assert parse_yaml_12(text) == parse_yaml(text, file)


def test_scalars_are_those_of_yaml_12() -> None:
    found = parse_yaml_12(SCALARS)
    assert found == parse_yaml(SCALARS, "scalars")
    assert [type(value) for value in found] == [
        type(value) for value in parse_yaml(SCALARS, "scalars")
    ]
    assert found[0] == 1e-05
    assert found[8] == "on"
    assert math.isinf(found[-1])


def test_what_is_no_yaml_is_refused() -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml_12("a: [")
