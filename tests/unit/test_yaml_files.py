"""A YAML file that cannot be read is named with its line, whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_engines.errors import ConfigError
from diffusion_engines.yaml_files import check_folder, read_mapping

# What is wrong, and what is said of it.
BROKEN = {
    "tab": (b"a:\n\tb: 1\n", "line 2: found character '\\t'"),
    "twice": (b"a: 1\nb: 2\na: 3\n", "line 3: found duplicate key a"),
    "latin-1": (b"a: 1\n\nb: \xe4\n", "line 3: the byte 0xe4 is not UTF-8"),
    "utf-16": ("a: 1\n".encode("utf-16"), "line 1: the byte 0xff is not UTF-8"),
    "python": (b"a: !!python/object/apply:os.system ['touch ran']\n", "line 1: could not"),
    "nul": (b"a: 1\nb: \x00\n", "line 2: special characters are not allowed"),
    "two": (b"a: 1\n---\nb: 2\n", "line 2: but found another document"),
    "list": (b"- 1\n", "a list where keys should be"),
    "value": (b"1\n", "a value where keys should be"),
    "list as a key": (b"a: 1\n? [1]\n: 2\n", "line 2: found unhashable key"),
    "no number": (b"a: !!int x\n", "invalid literal for int()"),
    "date": (b"a: !!timestamp 2020-01-01\n", "Value 'date' is not a supported primitive type"),
    "deep": (b"[" * 1500, "maximum recursion depth exceeded"),
    "in itself": (b"a: &a [*a]\n", "maximum recursion depth exceeded"),
    "open": (b"a: ${b\n", "no viable alternative"),
    "no alias": (b"a: *b\n", "line 1: found undefined alias"),
}


@pytest.mark.parametrize(("content", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("conf/export/mine.yaml")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_mapping(path)
    assert raised.value.problem.startswith("conf/export/mine.yaml: ")
    assert expected in raised.value.problem
    assert "\n" not in raised.value.problem
    assert not Path("ran").exists()
    with pytest.raises(ConfigError, match="conf/export/mine") as raised:
        check_folder(Path("conf"))
    assert expected in str(raised.value)


def test_every_broken_file_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("a: 1e-5\n")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text("\ta: 1\n")
    with pytest.raises(ConfigError, match="2 file") as raised:
        check_folder(tmp_path)
    assert "good" not in str(raised.value)


def test_a_missing_params_yaml_is_composed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make params"):
        read_mapping(tmp_path / "params.yaml")
