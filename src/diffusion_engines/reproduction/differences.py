"""What differs between two files that should be equal, as far as their format can be read.

Each kind of file is known by its first bytes or its name: ONNX by nodes and weights, safetensors by
tensors, archives (TorchScript, exported programs) by members, shared libraries (AOTInductor) by
sections, JSON by keys, such as the tactics in a plan's ``layers.json``. Of a plan itself, whose
format is NVIDIA's own, there are the bytes that differ, and paths and times in their texts.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_engines.errors import first_line
from diffusion_engines.wording import some

_SHOWN = 3
_TEXT = re.compile(rb"[\x20-\x7e]{6,}")
# Dates and clock times as compilers and loggers write them.
_TIME = re.compile(
    r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d:\d\d)?|\d\d:\d\d:\d\d|\b[A-Z][a-z]{2} {1,2}\d{1,2} \d{4}\b"
)
_PATH = re.compile(r"(?:/[\w.+-]+){2,}")


def differing_files(before: Path, after: Path) -> dict[str, list[str]]:
    """Return what differs between the files of two folders, by their relative paths."""
    ours, theirs = _files(before), _files(after)
    found = {name: ["is not there any more"] for name in ours.keys() - theirs.keys()}
    found |= {name: ["is new"] for name in theirs.keys() - ours.keys()}
    for name in ours.keys() & theirs.keys():
        if what := differences_of_files(ours[name], theirs[name]):
            found[name] = what
    return dict(sorted(found.items()))


def differences_of_files(before: Path, after: Path) -> list[str]:
    """Return what differs between two files, a sentence each; nothing where they are equal."""
    one, other = before.read_bytes(), after.read_bytes()
    return [] if one == other else _differences(before.name, one, other)


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _differences(name: str, one: bytes, other: bytes) -> list[str]:
    try:
        found = _reader(name, one, other)(one, other)
    except Exception as error:  # of whatever reads the format: then the bytes alone speak
        found = [f"cannot be read as what its name says: {first_line(error)}"]
    return [*found, *_bytes(one, other)] if not found or "cannot be read" in found[0] else found


def _reader(name: str, one: bytes, other: bytes) -> Callable[[bytes, bytes], list[str]]:
    for start, reader in ((b"PK\x03\x04", _archives), (b"\x7fELF", _libraries)):
        if one.startswith(start) and other.startswith(start):
            return reader
    by_name = {".json": _json, ".onnx": _graphs, ".safetensors": _tensors}
    return by_name.get(Path(name).suffix, _bytes)


def _json(one: bytes, other: bytes) -> list[str]:
    """Compare values by key; of many of one name, such as tactics, how many there are."""
    before, after = dict(_leaves(json.loads(one))), dict(_leaves(json.loads(other)))
    changed = [
        (key, before.get(key, "nothing"), after.get(key, "nothing"))
        for key in dict.fromkeys([*before, *after])
        if before.get(key, _MISSING) != after.get(key, _MISSING)
    ]
    by_name: dict[str, list[tuple[str, Any, Any]]] = {}
    for change in changed:
        by_name.setdefault(re.sub(r"\[\d+\]", "[]", change[0]), []).append(change)
    lines = []
    for name, changes in by_name.items():
        key, was, is_ = changes[0]
        count = f"{len(changes)} values of {name} differ, such as " if changes[1:] else ""
        lines.append(f"{count}{key}: {_short(was)} → {_short(is_)}")
    return lines


_MISSING = object()


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _graphs(one: bytes, other: bytes) -> list[str]:
    """Compare ONNX models; tensors beside them are files of their own."""
    import onnx

    before, after = (onnx.load_model_from_string(data) for data in (one, other))
    lines = []
    for key in ("ir_version", "producer_name", "producer_version", "domain", "doc_string"):
        if (was := getattr(before, key)) != (now := getattr(after, key)):
            lines.append(f"{key}: {_short(was)} → {_short(now)}")
    kinds = [Counter(node.op_type for node in model.graph.node) for model in (before, after)]
    if kinds[0] != kinds[1]:
        lines += [
            f"{kind} nodes: {kinds[0][kind]} → {kinds[1][kind]}"
            for kind in sorted(kinds[0].keys() | kinds[1].keys())
            if kinds[0][kind] != kinds[1][kind]
        ]
    else:
        pairs = zip(before.graph.node, after.graph.node, strict=True)
        nodes = [a.name or a.op_type for a, b in pairs if a != b]
        lines += _named("nodes", nodes)
    tensors = [_serialized(model.graph.initializer) for model in (before, after)]
    lines += _named("weights", _keys_that_differ(*tensors))
    metadata = [{entry.key: entry.value for entry in m.metadata_props} for m in (before, after)]
    lines += _named("metadata", _keys_that_differ(*metadata))
    for what in ("input", "output", "value_info"):
        values = [_serialized(getattr(model.graph, what)) for model in (before, after)]
        lines += _named(f"of {what}", _keys_that_differ(*values))
    return lines


def _serialized(values: Any) -> dict[str, bytes]:
    return {value.name: value.SerializeToString(deterministic=True) for value in values}


def _keys_that_differ(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys([*before, *after])
    return [key for key in keys if before.get(key, _MISSING) != after.get(key, _MISSING)]


def _named(what: str, names: list[str]) -> list[str]:
    return [f"{len(names)} {what} differ: {some(names)}"] if names else []


def _tensors(one: bytes, other: bytes) -> list[str]:
    """Compare safetensors: a length of 8 bytes, a header in JSON, then the data of all tensors."""
    tables = []
    for data in (one, other):
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        notes = header.pop("__metadata__", {})
        tensors = {
            name: (
                entry["dtype"],
                tuple(entry["shape"]),
                data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            )
            for name, entry in header.items()
        }
        tables.append((tensors, notes))
    (before, notes_before), (after, notes_after) = tables
    return [
        *_named("tensors", _keys_that_differ(before, after)),
        *_named("notes", _keys_that_differ(notes_before, notes_after)),
    ]


def _archives(one: bytes, other: bytes) -> list[str]:
    lines = []
    with zipfile.ZipFile(io.BytesIO(one)) as before, zipfile.ZipFile(io.BytesIO(other)) as after:
        names = dict.fromkeys([*before.namelist(), *after.namelist()])
        for name in names:
            if name not in before.namelist() or name not in after.namelist():
                lines.append(f"{name}: only in one of them")
            elif (was := before.read(name)) != (now := after.read(name)):
                lines += [f"{name}: {line}" for line in _differences(name, was, now)]
        if not lines:
            times = [
                name
                for name in names
                if before.getinfo(name).date_time != after.getinfo(name).date_time
            ]
            lines += _named("times of members", times)
    return lines


def _libraries(one: bytes, other: bytes) -> list[str]:
    """Compare shared libraries by section (ELF, 64 bits, little-endian: man 5 elf)."""
    before, after = _sections(one), _sections(other)
    lines = []
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            lines.append(f"section {name}: only in one of them")
        elif before[name] != after[name]:
            lines += [f"section {name}: {line}" for line in _bytes(before[name], after[name])]
    return lines


def _sections(data: bytes) -> dict[str, bytes]:
    offset, size, count, names_at = (
        struct.unpack_from("<Q", data, 0x28)[0],
        *struct.unpack_from("<HHH", data, 0x3A),
    )
    headers = [struct.unpack_from("<IIQQQQ", data, offset + index * size) for index in range(count)]
    names = headers[names_at]
    sections = {}
    for name_at, kind, _flags, _address, start, length in headers:
        first = names[4] + name_at
        name = data[first : data.index(b"\0", first)].decode()
        # SHT_NOBITS: nothing of it is in the file.
        sections[name] = b"" if kind == 8 else data[start : start + length]
    return sections


def _bytes(one: bytes, other: bytes) -> list[str]:
    """Say how many bytes differ and where, and which paths and times are in one file alone."""
    lines = []
    if len(one) != len(other):
        lines.append(f"{len(one)} bytes → {len(other)} bytes")
    length = min(len(one), len(other))
    unequal = np.flatnonzero(
        np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
    )
    if len(unequal):
        lines.append(f"{len(unequal)} of {length} bytes differ, the first at {unequal[0]}")
    before, after = _texts(one), _texts(other)
    for what, pattern in (("paths", _PATH), ("times", _TIME)):
        old, new = _matching(pattern, before - after), _matching(pattern, after - before)
        if old != new:
            lines.append(f"{what} in it: {_listed(old)} → {_listed(new)}")
    return lines


def _texts(data: bytes) -> set[str]:
    return {found.group().decode() for found in _TEXT.finditer(data)}


def _matching(pattern: re.Pattern[str], texts: set[str]) -> list[str]:
    return sorted({found for text in texts for found in pattern.findall(text)})


def _listed(values: list[str]) -> str:
    more = f" and {len(values) - _SHOWN} more" if values[_SHOWN:] else ""
    return ", ".join(values[:_SHOWN]) + more if values else "none"
