"""Read the YAML that a person edits: what is wrong with it is said with its file and line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What conf/ is composed into.
PARAMS = Path("params.yaml")


def read_mapping(path: Path) -> DictConfig:
    """Return a YAML file as OmegaConf reads it: ``1e-5`` is a number, no key twice, no code.

    Raises:
        ConfigError: the file is missing, is not UTF-8 or not YAML, or holds something else than
            keys with plain values.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", fix=_fix(path)) from error
    try:
        content = OmegaConf.create(data.decode())
    except UnicodeDecodeError as error:
        byte, line = data[error.start], _line(data[: error.start])
        raise _unreadable(path, f"{line}: the byte 0x{byte:02x} is not UTF-8") from error
    except YAMLError as error:
        raise _unreadable(path, _what(error, data)) from error
    except AssertionError as error:  # OmegaConf's, of a file that is one value
        raise _unreadable(path, "a value where keys should be") from error
    # A value: `!!int x`, a date, a list in itself, an interpolation that does not end.
    except (ValueError, RecursionError, OmegaConfBaseException) as error:
        raise _unreadable(path, "".join(str(error).splitlines()[:1])) from error
    if not isinstance(content, DictConfig):
        raise _unreadable(path, "a list where keys should be")
    return content


def check_folder(folder: Path) -> None:
    """Read every YAML file below a folder.

    Raises:
        ConfigError: names each that cannot be read.
    """
    problems = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            read_mapping(path)
        except ConfigError as error:
            problems.append(error.problem)
    if problems:
        raise ConfigError(
            f"{len(problems)} file(s) cannot be read:\n  - " + "\n  - ".join(problems),
            expected=_EXPECTED,
            fix="correct the files named, then compose again with `make params`",
        )


_EXPECTED = "YAML in UTF-8: indented by spaces, each key once, plain values"


def _what(error: Exception, data: bytes) -> str:
    """Return where a YAML reader stopped, and why, in one line."""
    mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    if mark is not None:
        return f"line {mark.line + 1}: {problem}"
    if position is not None:
        return f"{_line(data.decode()[:position].encode())}: {problem}"
    return str(problem)


def _line(before: bytes) -> str:
    return f"line {before.count(bytes([10])) + 1}"


def _unreadable(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path}: {what}", expected=_EXPECTED, fix=_fix(path))


def _fix(path: Path) -> str:
    return "compose it with `make params`" if path.name == PARAMS.name else f"correct {path}"
