"""A test double of NVIDIA's trtexec: it builds nothing.

It takes the options that the release in TRTEXEC_DOUBLE_RELEASE parses, of tests/data/, and fails on
any other one, as trtexec does. What it writes has the form of trtexec's files and no meaning: that
a build with it passes says that the command line is well formed, not that TensorRT would build.
TRTEXEC_DOUBLE_FAULT makes it fail in ways that trtexec has.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

RELEASE = os.environ["TRTEXEC_DOUBLE_RELEASE"]
FAULT = os.environ.get("TRTEXEC_DOUBLE_FAULT", "")
OPTIONS = json.loads((Path(__file__).parents[1] / "data" / "trtexec_options.json").read_text())
FORMATS = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.FLOAT16: "FP16"}
DATATYPES = {"FP32": "Float", "FP16": "Half"}


def banner() -> str:
    major, minor, patch = ([int(part) for part in RELEASE.split(".")] + [0, 0])[:3]
    number = f"{major}{minor:02}{patch:02}" if major >= 10 else f"{major}{minor}{patch:02}"
    build = " [b1]" if (major, minor) >= (10, 9) else ""
    return f"TensorRT.trtexec [TensorRT v{number}]{build} # trtexec {' '.join(sys.argv[1:])}"


def fail(message: str, *, parsing: bool = False) -> None:
    print(f"[E] {message}")
    # From 11.1 on, it ends without a word more where it cannot parse its options.
    if not parsing or tuple(map(int, RELEASE.split(".")[:2])) < (11, 1):
        print(f"&&&& FAILED {banner()}")
    sys.exit(1)


def parse(arguments: list[str]) -> dict[str, str]:
    known, options = OPTIONS["releases"][RELEASE], {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in known["flags"] + known["valued"]:
            fail(f"Unknown option: {name} {value}", parsing=True)
        if bool(equals) != (name in known["valued"]):
            fail(f"{name}: a value is {'missing' if not equals else 'not expected'}", parsing=True)
        if name in options:
            fail(f"{name} is there twice", parsing=True)
        options[name] = value
    return options


def check_shapes(graph: onnx.GraphProto, options: dict[str, str]) -> None:
    bounds = [options.get(f"--{bound}Shapes") for bound in ("min", "opt", "max")]
    if not any(bounds):
        if any(d.dim_param for i in graph.input for d in i.type.tensor_type.shape.dim):
            fail("Dynamic dimensions required for input, but no shapes were provided")
        return
    given = [dict(part.split(":") for part in (text or "").split(",")) for text in bounds]
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if not any(d.dim_param for d in dims):
            if value.name in given[0]:
                fail("Static model does not take explicit shapes")
            continue
        low, middle, high = ([int(n) for n in shapes[value.name].split("x")] for shapes in given)
        for dim, sizes in zip(dims, zip(low, middle, high, strict=True), strict=True):
            if list(sizes) != sorted(sizes) or (
                not dim.dim_param and set(sizes) != {dim.dim_value}
            ):
                fail(f"bad shapes for {value.name}: {sizes}")


def layers(graph: onnx.GraphProto, options: dict[str, str]) -> Sequence[object]:
    if options.get("--profilingVerbosity") != "detailed":
        return [node.name for node in graph.node]
    old = int(RELEASE.split(".")[0]) < 10
    # Weakly typed builders stay in fp32 unless a flag lets them leave it.
    allowed = not old or "--fp16" in options
    found = []
    for weight in graph.initializer:
        if weight.data_type in FORMATS:
            name = FORMATS[weight.data_type] if allowed and FAULT != "fp32" else "FP32"
            text = f"Row major linear {name} format" if old else DATATYPES[name]
            field = "Datatype" if int(RELEASE.split(".")[0]) >= 11 else "Format/Datatype"
            tensor = {"Name": weight.name, "Dimensions": [1], field: text}
            found.append({"Name": weight.name, "LayerType": "gemm", "Outputs": [tensor]})
    return found


def write_layers(path: Path, graph: onnx.GraphProto, options: dict[str, str]) -> None:
    none = options.get("--profilingVerbosity") == "none"  # "no layer information will be printed"
    path.write_text("" if none else json.dumps({"Layers": layers(graph, options)}))


def main() -> None:
    print(f"&&&& RUNNING {banner()}")
    if sys.argv[1:] == ["--help"]:
        known = OPTIONS["releases"][RELEASE]
        print("\n".join(f"  {name}" for name in sorted(known["flags"] + known["valued"])))
        return
    options = parse(sys.argv[1:])
    if "--onnx" not in options or not Path(options["--onnx"]).is_file():
        fail("Model missing or format not recognized")
    graph = onnx.load(options["--onnx"], load_external_data=False).graph
    check_shapes(graph, options)
    print("[I] Generating optimized engine", flush=True)
    if FAULT == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if FAULT != "no engine":
        Path(options["--saveEngine"]).write_bytes(b"the double's engine")
    if "--exportLayerInfo" in options:
        write_layers(Path(options["--exportLayerInfo"]), graph, options)
    if "--timingCacheFile" in options:
        cache = Path(options["--timingCacheFile"])
        cache.write_text((cache.read_text() if cache.exists() else "") + "one build\n")
        Path(f"{cache}.lock").touch()  # which it leaves behind
    print(f"&&&& PASSED {banner()}")


if __name__ == "__main__":
    main()
