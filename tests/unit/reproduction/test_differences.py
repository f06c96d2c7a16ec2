"""Files that should be equal and are not: what differs is said in the words of their format."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from diffusion_engines.reproduction.differences import differences_of_files, differing_files

Write = Callable[[Path, bool], None]


def write_json(path: Path, changed: bool) -> None:
    layers = [{"Name": "conv", "TacticName": "a"}, {"Name": "gemm", "TacticName": "b"}]
    if changed:
        layers = [{**layer, "TacticName": layer["TacticName"] * 2} for layer in layers]
    path.write_text(json.dumps({"Layers": layers}))


def write_onnx(path: Path, changed: bool) -> None:
    weight = numpy_helper.from_array(np.full(3, 2.0 if changed else 1.0, np.float32), "weight")
    node = helper.make_node("Sub" if changed else "Add", ["x", "weight"], ["y"], name="sum")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    graph = helper.make_graph([node], "graph", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph), path)


def write_onnx_names(path: Path, changed: bool) -> None:
    write_onnx(path, False)
    model = onnx.load(path)
    if changed:
        model.graph.node[0].name = "another"
    onnx.save(model, path)


def write_tensors(path: Path, changed: bool) -> None:
    save_file({"a": np.zeros(4), "b": np.full(4, float(changed))}, path)


def write_archive(path: Path, changed: bool) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("same.txt", "same")
        archive.writestr("a.json", json.dumps({"key": changed}))


def write_times(path: Path, changed: bool) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a", (2026, 1, 1 + changed, 0, 0, 0)), "same")


def write_library(path: Path, changed: bool) -> None:
    """As a compiler lays it out: a header, the sections' bytes, their names, their table."""
    text = b"/tmp/tmpxyz/model.cpp\0" if changed else b"/tmp/tmpabc/model.cpp\0"
    names = b"\0.text\0.rodata\0.bss\0.shstrtab\0"
    content = [b"", b"\x90" * 16, text, b"", names]
    start, headers, data = 64, [], b""
    for name, kind, part in zip(
        ("", ".text", ".rodata", ".bss", ".shstrtab"), (0, 1, 1, 8, 3), content, strict=True
    ):
        at = names.index(name.encode() + b"\0")
        headers.append(struct.pack("<IIQQQQIIQQ", at, kind, 0, 0, start, len(part), 0, 0, 1, 0))
        data, start = data + part, start + len(part)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, start, 0, 64, 0, 0, 64, len(headers), 4
    )
    path.write_bytes(head + data + b"".join(headers))


def write_plan(path: Path, changed: bool) -> None:
    time = b"built 2026-11-25 12:00:0" + (b"1" if changed else b"0")
    path.write_bytes(bytes(100) + time + bytes(20 + changed))


CASES: dict[str, tuple[str, Write, list[str]]] = {
    "tactics": (
        "layers.json",
        write_json,
        ["2 values of Layers[].TacticName differ, such as Layers[0].TacticName: a → aa"],
    ),
    "operators": (
        "engine.onnx",
        write_onnx,
        ["Add nodes: 1 → 0", "Sub nodes: 0 → 1", "1 weights differ: weight"],
    ),
    "names of nodes": ("engine.onnx", write_onnx_names, ["1 nodes differ: sum"]),
    "tensors": ("weights.safetensors", write_tensors, ["1 tensors differ: b"]),
    "members": ("engine.ts", write_archive, ["a.json: key: False → True"]),
    "times of members": ("engine.pt2", write_times, ["1 times of members differ: a"]),
    "sections": (
        "engine.so",
        write_library,
        [
            "section .rodata: 3 of 22 bytes differ, the first at 8",
            "section .rodata: paths in it: /tmp/tmpabc/model.cpp → /tmp/tmpxyz/model.cpp",
        ],
    ),
    "bytes": (
        "engine.plan",
        write_plan,
        [
            "145 bytes → 146 bytes",
            "1 of 145 bytes differ, the first at 124",
            "times in it: 2026-11-25 12:00:00 → 2026-11-25 12:00:01",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_said_in_the_words_of_the_format(case: str, tmp_path: Path) -> None:
    name, write, expected = CASES[case]
    for folder in ("before", "same", "after"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, folder == "after")
    assert differences_of_files(tmp_path / "before" / name, tmp_path / "same" / name) == []
    assert differences_of_files(tmp_path / "before" / name, tmp_path / "after" / name) == expected


@pytest.mark.parametrize("name", ["a.json", "a.onnx", "a.safetensors", "a.so", "a.pt2"])
def test_a_file_that_is_not_what_its_name_says_is_compared_byte_by_byte(
    name: str, tmp_path: Path
) -> None:
    start = {"a.so": b"\x7fELF", "a.pt2": b"PK\x03\x04"}.get(name, b"")
    for folder, byte in (("before", b"1"), ("after", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(start + b"\xff\xfe{" + byte)
    first, *rest = differences_of_files(tmp_path / "before" / name, tmp_path / "after" / name)
    assert first.startswith("cannot be read as what its name says: ")
    size = len(start) + 4
    assert rest == [f"1 of {size} bytes differ, the first at {size - 1}"]


def test_files_that_come_or_go_are_said_too(tmp_path: Path) -> None:
    for folder, names in (("before", ("a/x", "gone")), ("after", ("a/x", "new"))):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("equal")
    assert differing_files(tmp_path / "before", tmp_path / "after") == {
        "gone": ["is not there any more"],
        "new": ["is new"],
    }
