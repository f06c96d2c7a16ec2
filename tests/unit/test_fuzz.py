"""Any bytes where a configuration or a manifest should be end in an error of this project.

Hypothesis makes them, the same ones each time: bytes, texts of YAML's own characters, and valid
files with a value replaced.
"""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffusion_engines import manifests
from diffusion_engines.checks import check_params
from diffusion_engines.config import params_from_config
from diffusion_engines.errors import ConfigError, IntegrityError
from diffusion_engines.files import MANIFEST
from diffusion_engines.tables import check_same
from diffusion_engines.yaml_files import read_mapping
from tests.composition import ROOT
from tests.manifests import graph_manifest

# Whatever the machine, and whether it is CI: a failure here is one everywhere.
fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
# What YAML and JSON can hold, and a person may write.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "..", "/", "fp32", "${x", "$(id)", "\0", "nan", "-1", "cpu"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@fuzzed
@given(
    st.binary(max_size=200) | st.text("ab:-[]{}&*!|>?%@`#,'\"\\ \t\n0.${}~<\xe9").map(str.encode)
)
@example(b"\xff")
@example(b"a: &a [*a]")
def test_any_bytes_are_a_mapping_or_a_config_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        read_mapping(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value of nested mappings and lists."""
    inner: list[tuple[Any, Any]]
    if isinstance(value, dict):
        inner = [*value.items()]
    elif isinstance(value, list):
        inner = [*enumerate(value)]
    else:
        return [path]
    return [path, *(found for key, one in inner for found in places(one, (*path, key)))]


def replaced(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(whole)
    part = changed
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return changed


@fuzzed
@given(st.sampled_from(places(PARAMS)[1:]), VALUES)
def test_any_value_in_params_is_checked_or_a_config_error(
    path: tuple[Any, ...], value: object
) -> None:
    wrong = replaced(PARAMS, path, value)
    with contextlib.suppress(ConfigError):
        params = params_from_config(wrong)
        check_same(wrong, ROOT)
        check_params(params, ROOT)


@fuzzed
@given(st.dictionaries(st.text(max_size=8) | st.sampled_from([*PARAMS]), VALUES, max_size=4))
@example({1: 2, "x": 3})
@example({b"x": 3})
def test_any_mapping_of_sections_is_a_config_error(sections: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError):
        params_from_config(sections)
    with pytest.raises(ConfigError):
        params_from_config(PARAMS | {"model": sections})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with its manifest, whose manifest each example writes anew."""
    path = tmp_path_factory.mktemp("graph")
    (path / "model.onnx").write_bytes(b"graph")
    manifests.write(path, graph_manifest())
    return path


@fuzzed
@given(st.binary(max_size=200) | VALUES.map(json.dumps).map(str.encode))
def test_any_bytes_in_a_manifest_are_an_integrity_error(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(IntegrityError):
        manifests.read(folder, manifests.Graph)


@fuzzed
@given(st.data())
def test_any_value_in_a_manifest_is_read_or_an_integrity_error(
    folder: Path, data: st.DataObject
) -> None:
    manifests.write(folder, graph_manifest())
    whole = json.loads((folder / MANIFEST).read_text())
    wrong = replaced(whole, data.draw(st.sampled_from(places(whole))), data.draw(VALUES))
    (folder / MANIFEST).write_text(json.dumps(wrong))
    with contextlib.suppress(IntegrityError):
        manifests.read(folder, manifests.Graph)


@fuzzed
@given(st.data())
def test_any_bit_flip_in_a_manifest_is_read_or_an_integrity_error(
    folder: Path, data: st.DataObject
) -> None:
    manifests.write(folder, graph_manifest())
    content = bytearray((folder / MANIFEST).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / MANIFEST).write_bytes(bytes(content))
    with contextlib.suppress(IntegrityError):
        manifests.read(folder, manifests.Graph)
