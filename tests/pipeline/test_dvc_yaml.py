"""dvc.yaml tracks what the stages read: their parameters, their code, their outputs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from diffusion_engines.backends import backend, backend_names
from diffusion_engines.params import selector, tracked
from tests.conftest import ROOT, stage_config

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
    "environments.py",
    "errors.py",
    "files.py",
    "layout.py",
    "manifests.py",
    "names.py",
    "onnx/__init__.py",
    "onnx/versions.py",
    "params.py",
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
# What a backend wraps with is the folder that its `wrap_code` names, tested below.
_FOLDER = LIBRARY / "backends" / "nvidia" / "wrapping"
WRAPS = {path.relative_to(LIBRARY).as_posix() for path in _FOLDER.glob("*.py")}
# What this machine is reaches a build as a fingerprint and a measurement as a record: both are
# tracked themselves.
MACHINE = {"cpu.py", "machines.py"}
# Types, where nothing is asked of a family.
FAMILIES = {"families/__init__.py", "families/base.py"}
# Probes run every time. Backends are found by their names, which no import tells: what a build
# depends on is the one that it uses, tested below.
EXEMPT = {
    "probe": {"backends/probe.py"},
    "probe_machine": MACHINE,
    # It copies files; what checks an engine's inputs is for who loads it.
    "wrap": {"runtime/shapes.py", *WRAPS, *FAMILIES, *CHECKS, *TIMING},
    # It loads PyTorch networks alone, by the module that also loads engines.
    "reference": {
        "runtime/bundle.py",
        *WRAPS,
        "runtime/shapes.py",
        *CHECKS,
        *TIMING,
    },
    "build": {"onnx/graph.py", *TIMING},
    # They read recorded calls, whatever family recorded them.
    "simplify": FAMILIES,
    "quantize": FAMILIES,
    "benchmark": MACHINE,
    "generate": MACHINE,
}


def definition(name: str) -> dict:
    return STAGES[name].get("do", STAGES[name])


def names_imported(path: Path) -> set[str]:
    """What a file imports, anywhere in it: modules and what it takes from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imports_of(path: Path) -> set[str]:
    """The modules of the library that a file imports, anywhere in it."""
    found = set()
    for name in names_imported(path):
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


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_no_code_that_it_does_not_use(name: str) -> None:
    used: set[str] = set()
    todo = imports_of(ROOT / "stages" / f"{name}.py")
    while todo:
        used |= todo
        todo = set().union(*(imports_of(LIBRARY / module) for module in todo)) - used
    for dep in definition(name).get("deps", []):
        if dep.startswith("src/diffusion_engines/") and "${" not in dep:
            path = dep.removeprefix("src/diffusion_engines/")
            assert any(m == path or m.startswith(f"{path}/") for m in used), dep


@pytest.mark.parametrize("name", backend_names())
def test_the_code_of_a_backend_is_among_the_dependencies_of_build(name: str) -> None:
    """`code` and `shared` of the engines table, which dvc.yaml names, are all of it."""
    assert {"${item.code}", "${item.shared}"} <= set(definition("build")["deps"])
    assert "${item.wrap_code}" in definition("wrap")["deps"]
    declared = backend(name)
    paths = [ROOT / declared.code, ROOT / declared.shared]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert files
    needed = set().union(*(closure(file) for file in files)) - CHECKS - MACHINE - TIMING
    needed -= FAMILIES
    # The package's declaration and schema: what a target says is tracked as parameters.
    needed -= {f"backends/{part}.py" for part in (f"{name}/__init__", f"{name}/settings")}
    needed -= {"backends/nvidia/settings.py"}
    assert needed <= {file.relative_to(LIBRARY).as_posix() for file in files}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_tracks_the_keys_that_it_reads_and_no_others(name: str) -> None:
    params = definition(name).get("params", [])
    written = [param if isinstance(param, str) else next(iter(param)) for param in params]
    assert sorted(tracked(stage_config(name))) == sorted(written)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_picks_its_item_from_the_table_that_dvc_loops_over(name: str) -> None:
    picked = selector(stage_config(name))
    loop = STAGES[name].get("foreach")
    if picked is None:
        assert loop is None
        return
    argument, table = picked
    assert loop == f"${{{table}}}"
    assert definition(name)["cmd"].endswith(f"{name}.py +{argument}=${{key}}")


def test_nothing_imports_a_stage() -> None:
    # A script's own folder is on Python's path, so a stage would find another by its bare name.
    for path in [*(ROOT / "stages").glob("*.py"), *LIBRARY.rglob("*.py")]:
        imported = {name.split(".")[0] for name in names_imported(path)}
        assert not imported & {"stages", *STAGES}, path


@pytest.mark.parametrize("name", STAGES)
def test_every_output_lies_in_artifacts(name: str) -> None:
    outs = [o if isinstance(o, str) else next(iter(o)) for o in definition(name)["outs"]]
    assert all(out.startswith("artifacts/") for out in outs)


def test_the_networks_that_score_images_are_a_dependency_that_a_clone_has() -> None:
    assert "${validate.scorers}" in definition("validate")["deps"]
    scorers = yaml.safe_load((ROOT / "params.yaml").read_text())["validate"]["scorers"]
    assert (ROOT / scorers / ".gitkeep").is_file()


def test_folders_that_a_fleet_may_leave_empty_are_there() -> None:
    """A missing dependency ends a run at its end, and a fleet may measure or quantize nothing."""
    tables = ("exports", "quantized", "programs", "measured", "alternatives", "timing")
    loops = {f"${{{table}}}" for table in tables}
    for folder in filter(lambda path: path.startswith("artifacts/"), definition("report")["deps"]):
        writers = {
            STAGES[name].get("foreach")
            for name in STAGES
            for output in map(str, map(_path, definition(name).get("outs", [])))
            if output.startswith(f"{folder}/") or output == folder
        }
        assert writers, folder
        kept = ROOT / folder / ".gitkeep"
        assert kept.is_file() == (writers <= loops), folder


def _path(output: str | dict[str, object]) -> str:
    return output if isinstance(output, str) else next(iter(output))
