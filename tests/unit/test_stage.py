"""The runner of the stages: config, selectors, help, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from diffusion_engines import config
from diffusion_engines.errors import ConfigError
from diffusion_engines.files import new_folder
from diffusion_engines.stage import _run, config_from_mapping
from tests.conftest import ROOT

STAGES = sorted((ROOT / "stages").glob("*.py"))


@dataclass(frozen=True)
class Config:
    engine: str
    engines: dict[str, config.Engine]


@dataclass(frozen=True)
class Nothing:
    """No section."""


def params() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def test_a_stage_gets_its_sections_and_its_item() -> None:
    cfg, key = config_from_mapping(Config, params() | {"engine": "cpu-unet"})
    assert key == "cpu-unet"
    assert cfg.engines[key].onnx == "unet-fp32"


@pytest.mark.parametrize("engine", [None, "nope"])
def test_a_missing_item_lists_what_there_is(engine: str | None) -> None:
    with pytest.raises(ConfigError) as raised:
        config_from_mapping(Config, params() | ({"engine": engine} if engine else {}))
    assert "+engine= one of: cpu-text_encoder, cpu-unet" in str(raised.value)


def test_a_full_disk_ends_with_the_remedy_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = Path("artifacts/onnx/unet")

    def main(cfg: Nothing) -> None:
        with new_folder(target) as folder:
            (folder / "whole").write_text("x")
            with Path("/dev/full").open("w") as full:  # a real ENOSPC
                full.write("x" * 100_000)

    with pytest.raises(SystemExit) as raised:
        _run(main, "simplify", {})
    assert "no space left" in str(raised.value.code)
    assert "dvc gc" in str(raised.value.code)
    assert not target.exists()
    assert list(Path("artifacts/.tmp").iterdir()) == []


def test_a_library_that_hides_a_full_disk_is_seen_through() -> None:
    def main(cfg: Nothing) -> None:
        raise RuntimeError("write failed: No space left on device")

    with pytest.raises(SystemExit, match="no space left"):
        _run(main, "export", {})


def test_an_unknown_failure_keeps_its_traceback() -> None:
    def main(cfg: Nothing) -> None:
        raise RuntimeError("surprise")

    with pytest.raises(RuntimeError, match="surprise"):
        _run(main, "export", {})


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "default"},
    )


@pytest.mark.parametrize("script", STAGES, ids=lambda p: p.stem)
def test_help_says_what_a_stage_reads_and_writes(script: Path) -> None:
    done = run_script(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "\nReads   " in done.stdout
    assert "\nWrites  artifacts/" in done.stdout
    assert "Hydra" in done.stdout


def test_the_config_of_a_job_is_printed_with_its_overrides() -> None:
    capabilities = 'targets.rtx.compute_capabilities=["8.9","12.0"]'
    done = run_script(ROOT / "stages/build.py", "+engine=rtx-unet", capabilities, "--cfg", "job")
    assert done.returncode == 0, done.stderr
    job = yaml.safe_load(done.stdout)
    assert job["engine"] == "rtx-unet"
    assert job["targets"]["rtx"]["compute_capabilities"] == ["8.9", "12.0"]


@pytest.mark.parametrize(
    ("stage", "selector"),
    [
        ("export", "onnx=unet-fp16"),
        ("export", "+onnx=unet-fp16"),  # the library has a folder onnx: no group of configs
        ("probe", "target=cpu"),
        ("build", "engine=rtx-unet"),
    ],
)
def test_a_selector_picks_an_item(stage: str, selector: str) -> None:
    done = run_script(ROOT / f"stages/{stage}.py", selector, "--cfg", "job")
    assert done.returncode == 0, done.stderr
    key, _, value = selector.lstrip("+").partition("=")
    assert yaml.safe_load(done.stdout)[key] == value


def test_a_mistyped_override_is_refused() -> None:
    done = run_script(ROOT / "stages/build.py", "+engine=rtx-unet", "export.opst=3")
    assert done.returncode != 0
    assert "opst" in done.stderr


def test_a_stage_leaves_no_litter() -> None:
    before = set(ROOT.iterdir())
    run_script(ROOT / "stages/build.py", "--cfg", "job")
    assert set(ROOT.iterdir()) - before == set()
