"""params.yaml to typed sections: every mistake is named, with its key and its file."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_engines.checks import check_params
from diffusion_engines.compose import compose_params
from diffusion_engines.config import conf_digest, params_from_config
from diffusion_engines.errors import ConfigError
from diffusion_engines.tables import check_same
from tests.composition import ROOT, composed

CONF_FILES = sorted((ROOT / "conf").rglob("*.yaml"))
# These need a package, see below; and the launcher is composed by itself (tests/unit/fleet/).
NOT_ALONE = ("target", "build", "launcher")
OPTIONS = [f for f in CONF_FILES if f.parent.name not in ("conf", *NOT_ALONE)]


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def edited(params: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    changed = copy.deepcopy(params)
    change(changed)
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key",
    [
        "validate.components.unet.fp16.rel_l2",
        "validate.components.unet.fp16.max_abs",
        "validate.components.unet.fp16.cosine",
        "validate.latents.fp16.rel_l2",
        "validate.latents.fp16.cosine",
        "validate.images.fp16.psnr",
        "validate.images.fp16.ssim",
        "simplify.rel_l2.fp16",
        "quantize.int8.rel_l2",
        "quantize.fp16-mixed.rel_l2",
        "quantize.fp16-mixed.largest",
    ],
)
def test_a_tolerance_that_would_switch_its_gate_off_is_refused(
    params: dict[str, Any], key: str, value: float
) -> None:
    *folders, name = key.split(".")

    def change(sections: dict[str, Any]) -> None:
        for folder in folders:
            sections = sections[folder]
        assert name in sections
        sections[name] = value

    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        params_from_config(edited(params, change))


def test_the_committed_params_are_what_conf_composes_to(tmp_path: Path) -> None:
    for folder in ("conf", "hydra_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__py*"))
    assert compose_params([], tmp_path)
    ours, theirs = ((p / "params.yaml").read_text().splitlines() for p in (tmp_path, ROOT))
    # Hydra caches the resolver of the first plugin folder, so the digest is compared below.
    assert ours[:-1] == theirs[:-1]
    assert conf_digest(tmp_path / "conf") == conf_digest(ROOT / "conf")
    # Parsed: a digest such as 1367010e99859966 is a number without quotes, so it has them.
    assert yaml.safe_load(theirs[-1]) == {"conf_digest": conf_digest(ROOT / "conf")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p["export"].update(opst=3), ["export.opst: unknown key", "conf/export/"]),
        (lambda p: p["export"].update(opset="x"), ["export.opset:", "valid integer", "'x'"]),
        (lambda p: p["model"].pop("seed"), ["model.seed: missing", "conf/model/"]),
        (
            lambda p: p["targets"]["rtx"].update(compute_capabilities=[8.6]),
            ["targets.rtx.compute_capabilities.0:", "valid string", "conf/target/rtx.yaml"],
        ),
        (
            lambda p: p["targets"]["rtx"]["build"].update(foo=1),
            ["targets.rtx.build.foo: unknown key", "conf/build/"],
        ),
        (
            lambda p: p["targets"]["cpu"].update(backend="foo"),
            [
                "targets.cpu.backend: no such backend, there are inductor, onnxruntime, tensorrt, ",
                "'foo'",
                "conf/target/cpu.yaml",
            ],
        ),
        (lambda p: p["targets"]["cpu"].pop("backend"), ["targets.cpu.backend: missing"]),
        (lambda p: p["targets"].update(cpu=3), ["targets.cpu: input should be an object"]),
        (lambda p: p["image"].update(height=100), ["image.height", "multiple of 8"]),
        (lambda p: p.pop("simplify"), ["simplify: missing"]),
        (
            lambda p: p["model"].update(loras=[{"file": "a.safetensors", "wight": 1.0}]),
            ["model.loras.0.weight: missing", "model.loras.0.wight: unknown key", "conf/lora/"],
        ),
        (
            lambda p: p["model"].update(loras=[{"file": "a.safetensors", "weight": float("nan")}]),
            ["model.loras.0.weight", "finite number", "conf/lora/"],
        ),
        (
            lambda p: p["quantize"]["fp16-mixed"].update(largest=0.0),
            ["quantize.fp16-mixed.largest", "greater than 0", "conf/quantize/"],
        ),
        (
            lambda p: p["quantize"]["int8"].update(method="guess"),
            ["quantize.int8.method", "'max' or 'entropy'", "'guess'"],
        ),
        (
            lambda p: p["generate"].update(scheduler="foo"),
            ["generate.scheduler: expected one of lms, pndm, ", "'foo'", "conf/generate/"],
        ),
        (
            lambda p: p["fleet"]["rtx"].update(precision="fp17"),
            ["fleet.rtx.precision: expected one of fp32", "'fp17'", "conf/fleet/"],
        ),
        (
            lambda p: p["fleet"]["rtx"]["components"].update(unet="fp17"),
            ["fleet.rtx.components.unet: expected one of fp32", "conf/fleet/"],
        ),
        (
            lambda p: p["fleet"]["rtx"].update(precison="fp16"),
            ["fleet.rtx.precison: unknown key", "conf/fleet/"],
        ),
        (
            lambda p: p["validate"]["components"]["unet"]["fp16"].update(rel_l2=-1.0),
            ["validate.components.unet.fp16.rel_l2", "greater than 0"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_file(
    params: dict[str, Any], change: Callable[[dict[str, Any]], object], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        params_from_config(edited(params, change))
    for text in (*expected, "fix:", "make params"):
        assert text in str(raised.value)


def test_all_mistakes_are_reported_at_once(params: dict[str, Any]) -> None:
    wrong = edited(params, lambda p: (p["model"].pop("seed"), p["export"].update(opset="x")))
    with pytest.raises(ConfigError, match="2 problem") as raised:
        params_from_config(wrong)
    assert "model.seed" in str(raised.value)
    assert "export.opset" in str(raised.value)


def test_an_unknown_section_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unknown section.*modle"):
        params_from_config(params | {"modle": {}})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p["generate"].update(folder="x"), "generate.folder: for runs by hand"),
        (lambda p: p["export"].update(opset=13), "dynamo exporter lacks opset 13"),
        (lambda p: p["export"].update(opset=25), "lacks opset 25; expected 17 to 24"),
        (
            lambda p: p["export"].update(opset=12, exporter="torchscript"),
            "or with export.patches=[explicit_attention]",
        ),
        (
            lambda p: p["export"]["dynamic"].update(height=[256, 512]),
            "image.height 128 is outside [256, 512]",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    params: dict[str, Any], change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_params(params_from_config(edited(params, change)), ROOT)
    assert expected in str(raised.value)


@pytest.mark.parametrize("path", CONF_FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_conf_file_says_what_it_is_for(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if "@package" not in line]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 20


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_option_composes_and_fits(path: Path) -> None:
    params = composed(f"{path.parent.name}={path.stem}")
    check_same(params, ROOT)
    check_params(params_from_config(params), ROOT)


@pytest.mark.parametrize("target", sorted(p.stem for p in (ROOT / "conf/target").glob("*.yaml")))
def test_every_target_composes(target: str) -> None:
    params = composed(f"+target@targets.more={target}", "+precision@fleet.more=fp16")
    assert "more-unet" in params["engines"]
    check_params(params_from_config(params), ROOT)


def test_a_wrong_override_leaves_params_as_they_were(tmp_path: Path) -> None:
    for folder in ("conf", "hydra_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__py*"))
    compose_params([], tmp_path)
    before = (tmp_path / "params.yaml").read_bytes()
    for override in ("export.opset=x", "model=nope", "nonsense=1"):
        with pytest.raises(ConfigError):
            compose_params([override], tmp_path)
    assert (tmp_path / "params.yaml").read_bytes() == before
    assert not (tmp_path / ".params.partial.yaml").exists()


def test_a_broken_file_of_conf_is_named_before_anything_is_composed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf/export/dynamo.yaml").write_text("# Mine.\nopset: 18\nopset: 20\n")
    with pytest.raises(ConfigError, match=r"conf/export/dynamo\.yaml: line 3: found duplicate key"):
        compose_params([], tmp_path)


def test_the_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: 1\n")
    first = conf_digest(tmp_path)
    (tmp_path / "a.yaml").write_text("x: 2\n")
    second = conf_digest(tmp_path)
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
    assert len({first, second, conf_digest(tmp_path)}) == 3
