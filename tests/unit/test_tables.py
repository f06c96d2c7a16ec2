"""The tables that dvc.yaml loops over follow from what a person writes of a fleet."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from diffusion_engines.config import DERIVED
from diffusion_engines.errors import ConfigError
from diffusion_engines.tables import NAMES, check_same, derive_tables
from tests.composition import ROOT, composed, derived


def test_a_fleet_of_two_targets() -> None:
    params = composed()
    assert list(params["engines"]) == [
        f"{target}-{component}"
        for target in ("cpu", "rtx")
        for component in ("text_encoder", "unet", "vae_decoder")
    ]
    engine = params["engines"]["rtx-vae_decoder"]
    assert (engine["precision"], engine["graph"]) == ("fp16", "vae_decoder-fp16")
    assert engine["graph_folder"] == "artifacts/onnx/vae_decoder-fp16"
    assert params["graphs"]["vae_decoder-fp16"] == {
        "component": "vae_decoder",
        "weights": "vae",
        "precision": "fp16",
        "source": None,
    }
    assert params["exports"] == params["graphs"]
    assert params["quantized"] == params["timing"] == {}
    parts = {"text_encoder": "fp32", "unet": "fp32", "vae_decoder": "fp32"}
    alone: dict[str, Any] = {"alternative_to": None, "beside": {}}
    alone["beside_folder"] = "artifacts/checks/conf.json"
    assert params["measured"] == {"cpu": {"components": parts, **alone}}
    assert params["alternatives"] == {}


def test_a_stripped_engine_is_of_a_structure_and_its_bundle_of_the_graph() -> None:
    for target, source, added in (
        ("a10", "onnx/unet-fp16", "weights/model_index.json"),
        ("a10_stripped", "structures/unet-fp16", "onnx/unet-fp16"),
    ):
        engine = composed("fleet=refit")["engines"][f"{target}-unet"]
        paths = (engine["graph_folder"], engine["wrap_weights"])
        assert paths == (f"artifacts/{source}", f"artifacts/{added}")


@pytest.mark.parametrize(
    ("override", "precisions"),
    [
        ("fleet.cpu.precision=fp16", ("fp16", "fp16", "fp16")),
        ("fleet.cpu.components.unet=int8", ("fp32", "int8", "fp32")),
        ("fleet.cpu.components.denoiser=int8", ("fp32", "int8", "fp32")),
        ("fleet.cpu.components.encoder=fp16", ("fp16", "fp32", "fp32")),
    ],
)
def test_what_a_person_sweeps_over_needs_no_plus(
    override: str, precisions: tuple[str, ...]
) -> None:
    engines = composed(override)["engines"]
    names = ("text_encoder", "unet", "vae_decoder")
    assert tuple(engines[f"cpu-{name}"]["precision"] for name in names) == precisions


def test_a_component_goes_before_its_role() -> None:
    params = composed("fleet.cpu.components.unet=int8", "fleet.cpu.components.denoiser=fp16")
    assert params["engines"]["cpu-unet"]["precision"] == "int8"


def test_a_graph_in_8_bits_brings_the_one_that_it_is_made_from() -> None:
    params = composed("fleet.cpu.components.unet=int8", "fleet.rtx.only=[decoder]")
    assert params["quantized"]["unet-int8"]["source"] == "unet-fp16"
    assert "unet-fp16" in params["exports"]
    assert "unet-int8" not in params["exports"]
    params["quantize"]["int8"]["source"] = "fp32"
    assert derived(params)["quantized"]["unet-int8"]["source"] == "unet-fp32"


def test_a_graph_is_shared_by_the_targets_that_want_it() -> None:
    params = composed("fleet=rtx")
    assert {engine["graph"] for engine in params["engines"].values()} == set(params["graphs"])
    assert len(params["graphs"]) == 3


def test_a_backend_that_takes_no_onnx_gets_programs_of_its_own() -> None:
    params = composed("fleet=inductor_cpu")

    engine = params["engines"]["cpu_inductor-vae_decoder"]
    assert engine["graph_folder"] == "artifacts/programs/cpu_inductor/vae_decoder"
    # A program has no weights: they are added when it is wrapped, and there alone.
    assert engine["wrap_weights"] == "artifacts/weights/vae"
    assert params["programs"]["cpu_inductor-vae_decoder"] == {
        "target": "cpu_inductor",
        "component": "vae_decoder",
        "weights": "vae",
        "precision": "fp32",
    }
    assert [*params["programs"]] == [
        name for name, engine in params["engines"].items() if engine["backend"] == "inductor"
    ]
    assert {*params["graphs"]} == {"text_encoder-fp32", "unet-fp32", "vae_decoder-fp32"}
    assert params["engines"]["cpu-unet"]["wrap_weights"] == "artifacts/weights/model_index.json"


def test_an_alternative_is_measured_beside_what_it_is_one_to() -> None:
    params = composed("fleet=cpu_backends")

    parts = {"text_encoder": "fp32", "unet": "fp32", "vae_decoder": "fp32"}
    beside = {"beside": parts, "beside_folder": "artifacts/bundles/cpu"}
    found = params["measured"]["cpu_inductor"]
    assert found == {"components": parts, "alternative_to": "cpu", **beside}
    assert params["measured"]["cpu"]["alternative_to"] is None
    assert params["alternatives"] == {"cpu": {"targets": ["cpu_inductor"]}}
    for measure in ([], ["cpu"], ["cpu_inductor"]):  # there is nothing to choose between
        params["measure"] = measure
        assert derived(params)["alternatives"] == {}


@pytest.mark.parametrize(
    "name",
    [
        "c$(id)",
        "a b",
        "a.b",
        "a;b",
        "../a",
        "A10",
        "ä",
        "",
        "true",
        "on",
        "null",
        "cpu-wrap",
        123,
        True,
    ],
)
def test_a_name_that_would_be_more_than_a_name_is_refused(name: Any) -> None:
    params = composed()
    params["targets"] = {name: params["targets"]["cpu"]}
    params["fleet"] = {name: params["fleet"]["cpu"]}
    with pytest.raises(ConfigError, match="the name of a target cannot be") as raised:
        derive_tables(params, ROOT)
    assert repr(name) in str(raised.value)


def test_tables_cannot_be_set() -> None:
    params: dict[str, Any] = composed()
    check_same(params, ROOT)
    params["engines"]["cpu-unet"]["precision"] = "fp16"
    with pytest.raises(ConfigError, match="engines cannot be set") as raised:
        check_same(params, ROOT)
    assert "override fleet.<target>.precision" in str(raised.value)


def test_the_tables_are_those_that_the_config_knows() -> None:
    assert set(NAMES) == set(DERIVED) == set(derive_tables(composed(), ROOT))


def test_composing_imports_no_heavy_library() -> None:
    """DVC imports this whenever it composes: `dvc exp run -S` must not wait for PyTorch."""
    heavy = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt_rtx", "numpy")
    code = (
        "import sys; sys.path.insert(0, 'hydra_plugins'); import tables, yaml; "
        "from diffusion_engines.tables import derive_tables; from pathlib import Path; "
        "derive_tables(yaml.safe_load(Path('params.yaml').read_text()), Path()); "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
