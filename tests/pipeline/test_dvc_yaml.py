"""dvc.yaml tracks what the stages read: their parameters, their code, their outputs."""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from diffusion_engines.backends import backend, backend_names
from diffusion_engines.config import SECTIONS
from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
LIBRARY = ROOT / "src" / "diffusion_engines"
# These move data or report; they do not decide what a stage writes. Were they dependencies, a new
# benchmark option would rebuild every engine of every fleet.
PLUMBING = {
    "__init__.py",
    "arguments.py",
    "backends/__init__.py",
    "backends/base.py",
    "backends/nvidia/__init__.py",
    "backends/targets.py",
    "config.py",
    "errors.py",
    "files.py",
    "layout.py",
    "onnx/__init__.py",
    "onnx/versions.py",
    "parity/__init__.py",
    "precisions.py",
    "processes.py",
    "progress.py",
    "results.py",
    "runtime/__init__.py",
    "stage.py",
    "weights/__init__.py",
    "report/__init__.py",
    "bench/__init__.py",
}
# Timing caches save time: which one a build reads decides nothing that it must be rebuilt for.
TIMING = {"backends/timing.py"}
# These compare an engine with this machine, and say what is wrong: they write nothing.
CHECKS = {"backends/gpus.py", "backends/preflight.py"}
# What this machine is reaches a build as a fingerprint, which it tracks.
MACHINE = {"cpu.py"}
# Probes run every time. Backends are found by their names, which no import tells: what a build
# depends on is the one that it uses, tested below.
EXEMPT = {
    "probe": {"backends/probe.py"},
    "probe_machine": {"fingerprint.py", *MACHINE},
    # It copies files; what checks an engine's inputs is for who loads it.
    "wrap": {"runtime/shapes.py", *CHECKS, *TIMING},
    # It loads PyTorch networks alone, by the module that also loads engines.
    "reference": {
        "runtime/bundle.py",
        "backends/nvidia/torchscript.py",
        "runtime/shapes.py",
        *CHECKS,
        *TIMING,
    },
    # Weights' architecture classes and the report's other readers decide nothing here.
    "download": {"components.py", "runtime/networks.py"},
    "build": {"onnx/graph.py", *TIMING},
    # It reads recorded calls, by the module that also samples and records them.
    "quantize": {"components.py", "runtime/conditioning.py", "runtime/sampling.py"},
    "validate": {"components.py"},
    "benchmark": {"components.py"},
    "generate": {"components.py"},
    "report": {"components.py"},
}


def definition(name: str) -> dict:
    return STAGES[name].get("do", STAGES[name])


def imports_of(path: Path) -> set[str]:
    """The modules of the library that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if not name.startswith("diffusion_engines"):
                continue
            base = LIBRARY.joinpath(*name.split(".")[1:])
            for candidate in (base.with_suffix(".py"), base / "__init__.py"):
                if candidate.is_file():
                    found.add(candidate.relative_to(LIBRARY).as_posix())
    return found


def closure(path: Path) -> set[str]:
    seen: set[str] = set()
    todo = imports_of(path)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            # What only plumbing imports decides nothing either.
            if name not in PLUMBING:
                todo |= imports_of(LIBRARY / name)
    return seen - PLUMBING


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_script_of_its_name(name: str) -> None:
    assert f"python stages/{name}.py" in definition(name)["cmd"]
    if not definition(name).get("always_changed"):
        assert f"stages/{name}.py" in definition(name)["deps"]
    assert {p.stem for p in (ROOT / "stages").glob("*.py")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_the_code_of_a_stage_is_among_its_dependencies(name: str) -> None:
    deps = [
        dep.removeprefix("src/diffusion_engines/")
        for dep in definition(name).get("deps", [])
        if dep.startswith("src/diffusion_engines/") and "${" not in dep
    ]
    needed = closure(ROOT / "stages" / f"{name}.py") - EXEMPT.get(name, set())
    missing = {
        module
        for module in needed
        if not any(module == dep or module.startswith(f"{dep}/") for dep in deps)
    }
    assert not missing


def covered(path: str, name: str, stage: str) -> bool:
    """Whether a stage that uses a backend depends on a file or folder."""
    deps = (dep.replace("${item.backend}", name) for dep in definition(stage)["deps"])
    return any(path == dep or path.startswith(f"{dep}/") for dep in deps)


@pytest.mark.parametrize("name", backend_names())
def test_the_code_of_a_backend_is_among_the_dependencies_of_build(name: str) -> None:
    declared = backend(name)
    assert covered(declared.code, name, "build")
    assert covered(declared.shared, name, "build")
    own = [ROOT / declared.code, ROOT / declared.shared]
    files = [file for path in own for file in (path.rglob("*.py") if path.is_dir() else [path])]
    needed = set().union(*(closure(file) for file in files)) - CHECKS - MACHINE - TIMING
    # The package's declaration and schema: what a target says is tracked as parameters.
    needed -= {f"backends/{part}.py" for part in (f"{name}/__init__", f"{name}/settings")}
    needed -= {"backends/nvidia/settings.py"}
    assert needed <= {file.relative_to(LIBRARY).as_posix() for file in files}


@pytest.mark.parametrize("name", backend_names())
def test_the_code_that_wraps_is_among_the_dependencies_of_wrap(name: str) -> None:
    code = backend(name).wrap_code
    # What only declares writes nothing.
    assert covered(code, name, "wrap") or code.endswith("backends/base.py")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_tracks_the_sections_that_it_reads(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"stage_{name}", ROOT / "stages" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    read = {field.name for field in fields(module.Config)}
    if "params" in read:
        assert {"params.yaml": None} in definition(name)["params"]
        return
    tracked = {param.split(".")[0] for param in definition(name).get("params", [])}
    assert read & set(SECTIONS) == tracked


def test_stages_import_the_library_and_never_each_other() -> None:
    for path in (ROOT / "stages").glob("*.py"):
        assert "import stages" not in path.read_text()
        assert "sys.path" not in path.read_text()
    for path in LIBRARY.rglob("*.py"):
        assert "stages." not in path.read_text().replace("the stages.", "")


@pytest.mark.parametrize("name", STAGES)
def test_every_output_lies_in_artifacts(name: str) -> None:
    outs = [o if isinstance(o, str) else next(iter(o)) for o in definition(name)["outs"]]
    assert all(out.startswith("artifacts/") for out in outs)


def test_the_networks_that_score_images_are_a_dependency_that_a_clone_has() -> None:
    assert "${validate.scorers}" in definition("validate")["deps"]
    scorers = yaml.safe_load((ROOT / "params.yaml").read_text())["validate"]["scorers"]
    assert (ROOT / scorers / ".gitkeep").is_file()
