"""trtexec's command lines hold nothing that a release does not parse; its failures are errors.

No trtexec runs here: a double of it (tests/doubles/) takes each release's own option list.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines.backends.tensorrt import building
from diffusion_engines.backends.tensorrt.building import layers
from diffusion_engines.backends.tensorrt.building.trtexec import (
    find_trtexec,
    format_version,
    parse_version,
    trtexec_command,
)
from diffusion_engines.backends.tensorrt.settings import TensorRTBuild, TensorRTTarget
from diffusion_engines.config import Dynamic
from diffusion_engines.errors import BuildError, HardwareError
from diffusion_engines.families.base import Dim, TensorSpec
from tests.conftest import ROOT, Exports, graph_of
from tests.doubles.launcher import install
from tests.tiers import long_but

RELEASES = json.loads((ROOT / "tests/data/trtexec_options.json").read_text())["releases"]
BUILD = TensorRTBuild(
    optimization_level=3,
    workspace_mib=None,
    timing_cache=True,
    max_aux_streams=None,
    profiling_verbosity="detailed",
    tf32=False,
    version_compatible=False,
    exclude_lean_runtime=False,
    hardware_compatibility="none",
    weights="embedded",
)
A10 = TensorRTTarget("tensorrt", "A10", "8.6", ["torchscript"], BUILD)
OPEN = [
    TensorSpec("input_0", "latents", "component", (Dim("batch", 2, 2, 8), 4, 16, 16)),
    TensorSpec("input_1", "timestep", "float32", (1,)),
    TensorSpec("input_2", "text embeddings", "component", (Dim("batch", 2, 2, 8), 77, 32)),
]


def command(
    release: str,
    build: TensorRTBuild = BUILD,
    precision: str = "fp16",
    inputs: list[TensorSpec] | None = None,
    timing_cache: Path | None = None,
) -> list[str]:
    return trtexec_command(
        Path("trtexec"),
        parse_version(release),
        graph=graph_of(Path("model.onnx"), inputs or [], precision),
        plan=Path("engine.plan"),
        layers=Path("layers.json") if layers.has_layers(build) else None,
        timing_cache=timing_cache,
        build=build,
    )


def changed(**settings: Any) -> TensorRTBuild:
    return replace(BUILD, **settings)


# Every value of every option, each beside the defaults of the others, and all at once.
VARIANTS = {
    "default": BUILD,
    **{
        f"{key}={value}": changed(**{key: value})
        for key, values in {
            "optimization_level": (0, 5),
            "workspace_mib": (4096,),
            "max_aux_streams": (0, 2),
            "profiling_verbosity": ("none", "layer_names_only"),
            "tf32": (True,),
            "version_compatible": (True,),
            "hardware_compatibility": ("same_compute_capability", "ampere_plus"),
            "weights": ("refittable", "stripped"),
        }.items()
        for value in values
    },
    "all": replace(
        BUILD,
        workspace_mib=1,
        max_aux_streams=1,
        version_compatible=True,
        exclude_lean_runtime=True,
        hardware_compatibility="ampere_plus",
        weights="refittable",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("release", RELEASES)
def test_a_command_has_only_options_of_its_release(release: str, variant: str) -> None:
    for precision in ("fp32", "fp16", "bf16", "fp16-mixed", "int8"):
        check_command(release, variant, precision)


def check_command(release: str, variant: str, precision: str) -> None:
    version = parse_version(release)
    missing = {
        "weights=stripped": (10, 0, 0),
        "hardware_compatibility=same_compute_capability": (10, 9, 0),
    }.get(variant, (0, 0, 0))
    since = {"bf16": (9, 0, 0), "fp16-mixed": (10, 0, 0), "int8": (10, 0, 0)}
    if version < max(missing, since.get(precision, missing)):
        with pytest.raises(BuildError, match=rf"TensorRT {format_version(version)} has no"):
            command(release, VARIANTS[variant], precision, OPEN, Path("timing.cache"))
        return
    words = command(release, VARIANTS[variant], precision, OPEN, Path("timing.cache"))
    assert ("--exportLayerInfo=layers.json" in words) == layers.has_layers(VARIANTS[variant])
    for word in words[1:]:
        name, equals, value = word.partition("=")
        assert name in RELEASES[release]["valued" if equals else "flags"]
        assert value or not equals


@pytest.mark.parametrize(
    ("release", "works"), [("11.2.1", True), ("11.3.0", False), ("11.3.1", False), ("11.4", True)]
)
def test_refitting_is_refused_where_it_can_lose_a_bias(release: str, works: bool) -> None:
    for weights, flags in (
        ("refittable", {"--refit"}),
        # Without --refit, trtexec strips a plan for the weights of its build alone.
        ("stripped", {"--refit", "--stripWeights"}),
    ):
        if works:
            assert flags <= set(command(release, changed(weights=weights)))
            continue
        with pytest.raises(BuildError, match="can lose a bias") as raised:
            command(release, changed(weights=weights))
        assert "before 11.3.0, or 11.4.0 or later" in str(raised.value)


@pytest.mark.parametrize(("release", "asked"), [("10.13.3", False), ("10.14.0", True)])
def test_attention_may_be_decomposed_from_10_14_on(release: str, asked: bool) -> None:
    assert ("--decomposableAttentions=*" in command(release, BUILD, "fp32")) == asked


@pytest.mark.parametrize("release", RELEASES)
def test_attention_may_be_decomposed_where_there_is_an_option_for_it(release: str) -> None:
    asked = "--decomposableAttentions=*" in command(release, BUILD, "fp32")
    assert asked == ("--decomposableAttentions" in RELEASES[release]["valued"])


@pytest.mark.parametrize(
    ("release", "precision", "expected"),
    [
        ("8.6.1", "fp32", []),
        ("8.6.1", "fp16", ["--fp16"]),
        ("9.3.0", "bf16", ["--bf16"]),
        ("10.0.1", "fp16", ["--stronglyTyped"]),
        ("10.16", "bf16", ["--stronglyTyped"]),
        ("11.1", "fp16", []),
    ],
)
def test_precision_is_a_flag_then_a_network_then_the_rule(
    release: str, precision: str, expected: list[str]
) -> None:
    words = command(release, precision=precision)
    typing = {"--fp16", "--bf16", "--int8", "--fp8", "--best", "--stronglyTyped"}
    assert [word for word in words if word in typing] == expected


def test_shapes_are_given_for_open_inputs_alone() -> None:
    words = command("10.16", inputs=OPEN)
    assert "--minShapes=input_0:2x4x16x16,input_2:2x77x32" in words
    assert "--optShapes=input_0:2x4x16x16,input_2:2x77x32" in words
    assert "--maxShapes=input_0:8x4x16x16,input_2:8x77x32" in words
    static = [TensorSpec("input_0", "latents", "component", (2, 4, 16, 16))]
    assert not [word for word in command("10.16", inputs=static) if "Shapes" in word]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("8601", (8, 6, 1)),
        ("9300", (9, 3, 0)),
        ("100001", (10, 0, 1)),
        ("101303", (10, 13, 3)),
        ("110100", (11, 1, 0)),
        ("10.13.3.9", (10, 13, 3)),
        ("11.1", (11, 1, 0)),
    ],
)
def test_versions_are_read_in_both_spellings(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


@pytest.fixture(scope="module")
def graphs(exports: Exports) -> dict[str, Any]:
    found = {}
    for key, dynamic in (
        ("fixed", Dynamic(None, None, None)),
        ("open", Dynamic([1, 4], [64, 256], [64, 256])),
    ):
        loaded, path = exports("vae_decoder", "fp16", dynamic=dynamic)
        found[key] = path, loaded.inputs
    return found


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Puts the double of trtexec on PATH."""
    install(tmp_path / "bin", "trtexec")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRTEXEC_DOUBLE_RELEASE", "10.16")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    return monkeypatch


def run_build(graphs: dict[str, Any], folder: Path, key: str = "fixed", **changes: Any) -> Any:
    onnx, inputs = graphs[key]
    folder.mkdir(exist_ok=True)
    precision = changes.pop("precision", "fp16")
    cache = changes.pop("cache", None)
    target = replace(A10, build=replace(BUILD, **changes))
    return building.build(graph_of(onnx, inputs, precision), folder, target, cache)


# The first and the last of each way to type a network, and of each schema of layer information.
@pytest.mark.parametrize(
    ("release", "key"),
    long_but(
        [(release, "open") for release in ("8.6.1", "10.0.1", "10.16", "11.0", "11.1")],
        [*((release, "open") for release in RELEASES), ("8.6.1", "fixed"), ("11.1", "fixed")],
    ),
)
def test_the_double_accepts_a_build_of_every_release(
    double: pytest.MonkeyPatch, graphs: dict[str, Any], tmp_path: Path, release: str, key: str
) -> None:
    double.setenv("TRTEXEC_DOUBLE_RELEASE", release)
    path, version = find_trtexec() or (None, None)
    assert (path, version) == (tmp_path / "bin" / "trtexec", parse_version(release))
    result = run_build(graphs, tmp_path / "engine", key)
    assert result.builder == f"trtexec {format_version(parse_version(release))}"
    assert result.log.startswith(f"built by {result.builder}\n$ {path} --onnx=")
    assert result.precisions["fp16"] > 10
    left = sorted(file.name for file in (tmp_path / "engine").iterdir())
    assert left == ["engine.plan", "layers.json", "timing.cache"]


def test_a_timing_cache_is_handed_to_the_next_build(
    double: pytest.MonkeyPatch, graphs: dict[str, Any], tmp_path: Path
) -> None:
    run_build(graphs, tmp_path / "first")
    earlier = tmp_path / "first" / "timing.cache"
    run_build(graphs, tmp_path / "second", cache=earlier)
    assert (tmp_path / "second" / "timing.cache").read_text() == 2 * earlier.read_text()
    run_build(graphs, tmp_path / "third", cache=earlier, timing_cache=False)
    assert not (tmp_path / "third" / "timing.cache").exists()


@pytest.mark.parametrize(
    ("release", "fault", "changes", "expected"),
    [
        ("10.16", "crash", {}, ["trtexec 10.16.0", "SIGSEGV (it crashed)", "Generating optimized"]),
        ("10.16", "no engine", {}, ["wrote no engine", "engine.plan"]),
        ("10.16", "fp32", {}, ["mostly fp16", "× fp32"]),
        ("8.6.1", "fp32", {}, ["mostly fp16", "× fp32"]),
        (
            "8.6.1",
            "",
            {"profiling_verbosity": "layer_names_only"},
            ["chose the precisions", "profiling_verbosity=detailed"],
        ),
        # The graph is fp16: an engine of it in fp32 is not what was asked for either.
        ("11.1", "", {"precision": "fp32"}, ["mostly fp32", "× fp16"]),
        (
            "11.1",
            "",
            {"precision": "fp32", "profiling_verbosity": "none"},
            ["mostly fp32", "× fp16"],
        ),
    ],
)
def test_a_failed_build_is_an_error_that_says_why(
    double: pytest.MonkeyPatch,
    graphs: dict[str, Any],
    tmp_path: Path,
    release: str,
    fault: str,
    changes: dict[str, Any],
    expected: list[str],
) -> None:
    double.setenv("TRTEXEC_DOUBLE_RELEASE", release)
    double.setenv("TRTEXEC_DOUBLE_FAULT", fault)
    with pytest.raises(BuildError) as raised:
        run_build(graphs, tmp_path / "engine", **changes)
    for text in expected:
        assert text in str(raised.value)


def test_an_engine_without_layer_information_is_built_and_has_none(
    double: pytest.MonkeyPatch, graphs: dict[str, Any], tmp_path: Path
) -> None:
    result = run_build(graphs, tmp_path / "engine", profiling_verbosity="none")
    assert (result.layers, result.precisions) == ({}, {})
    assert not (tmp_path / "engine" / "layers.json").exists()


def test_names_alone_suffice_where_the_graph_decides(
    double: pytest.MonkeyPatch, graphs: dict[str, Any], tmp_path: Path
) -> None:
    result = run_build(graphs, tmp_path / "engine", profiling_verbosity="layer_names_only")
    assert result.precisions == {}


def test_a_trtexec_that_does_not_run_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        tmp_path / "bin",
        "trtexec",
        "import sys\nsys.exit('libnvinfer.so.10: cannot open shared object file')\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(HardwareError, match=r"libnvinfer\.so\.10: cannot open") as raised:
        find_trtexec()
    assert "the Python builder is used then" in str(raised.value)


def test_without_trtexec_and_without_the_library_the_fix_is_to_install_it(
    graphs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_trtexec() is None
    with pytest.raises(HardwareError, match="library tensorrt is not installed here"):
        run_build(graphs, tmp_path / "engine")
