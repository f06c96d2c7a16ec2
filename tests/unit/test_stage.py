"""The runner of the stages: config, selectors, help, and how it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
import yaml

from diffusion_engines import config, manifests
from diffusion_engines.backends.targets import Target
from diffusion_engines.errors import ConfigError, HardwareError
from diffusion_engines.failures import Failure, read_failures
from diffusion_engines.files import new_folder, read_json
from diffusion_engines.onnx.session import session_of
from diffusion_engines.params import EVERYTHING, config_from_mapping, key, param, slices, tracked
from diffusion_engines.parity.results import read_graph_check
from diffusion_engines.runtime.calls import Recorder
from diffusion_engines.stage import _run
from tests.conftest import ROOT
from tests.manifests import graph_manifest
from tests.tiers import long_but
from tests.waiting import is_gone, wait_for

STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py"))


@dataclass(frozen=True)
class Config:
    engine: str = key("engines")
    item: config.Engine = param("engines.${key}")
    target: Target = param("targets.${item.target}")


@dataclass(frozen=True)
class Nothing:
    """No section."""


def params() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def test_a_stage_gets_its_sections_and_its_item() -> None:
    cfg, name = config_from_mapping(Config, params() | {"engine": "rtx-unet"})
    assert name == cfg.engine == "rtx-unet"
    assert cfg.item.graph == "unet-fp16"
    assert cfg.target.backend == "tensorrt_rtx"


def test_a_stage_reads_the_keys_that_it_names_and_no_others() -> None:
    given = params() | {"engine": "rtx-unet"}
    assert tracked(Config) == ["engines.${key}", "targets.${item.target}"]
    assert slices(Config, given) == {
        "engines.rtx-unet": given["engines"]["rtx-unet"],
        "targets.rtx": given["targets"]["rtx"],
    }


def test_a_mistake_in_what_a_stage_reads_is_named_by_its_full_key() -> None:
    given = params() | {"engine": "rtx-unet"}
    given["targets"]["rtx"]["build"]["tf23"] = True
    with pytest.raises(ConfigError, match=r"targets\.rtx\.build\.tf23: unknown key"):
        config_from_mapping(Config, given)
    del given["targets"]["rtx"]
    with pytest.raises(ConfigError, match=r"targets\.rtx: missing"):
        config_from_mapping(Config, given)


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


@pytest.mark.parametrize("name", long_but(["build", "export", "probe"], STAGES))
def test_help_says_what_a_stage_reads_and_writes(name: str) -> None:
    done = run_script(ROOT / f"stages/{name}.py", "--help")
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
        ("export", "graph=unet-fp16"),
        ("export", "+graph=unet-fp16"),
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


def edit_params(old: str, new: str) -> None:
    path = Path("params.yaml")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@dataclass(frozen=True)
class ExportConfig:
    export: config.Export = param("export")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a stage, with params.yaml in it."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stage_whose_parameters_changed_meanwhile_fails(folder: Path) -> None:
    def main(cfg: ExportConfig) -> None:
        edit_params("opset: 18", "opset: 20")

    with pytest.raises(SystemExit) as raised:
        _run(main, "export", params(), params())
    assert "params.yaml changed while this stage ran" in str(raised.value.code)
    assert "export.opset: 18 → 20" in str(raised.value.code)


def test_parameters_of_others_may_change_under_a_stage(folder: Path) -> None:
    def main(cfg: ExportConfig) -> None:
        edit_params("skipped_optimizers: []", "skipped_optimizers: [fuse_qkv]")

    _run(main, "export", params(), params())


def test_a_stage_that_sees_all_parameters_compares_all(folder: Path) -> None:
    @dataclass(frozen=True)
    class All:
        params: dict = param(EVERYTHING)

    def main(cfg: All) -> None:
        edit_params("conf_digest: ", "conf_digest: x")

    main.__annotations__["cfg"] = All
    with pytest.raises(SystemExit, match="conf_digest: "):
        _run(main, "check_conf", params(), params())


def test_an_override_by_hand_is_no_change(folder: Path) -> None:
    def main(cfg: ExportConfig) -> None:
        assert cfg.export.opset == 20

    given = params()
    given["export"]["opset"] = 20
    _run(main, "export", given, params())


@pytest.mark.parametrize("link", ["symlink", "hardlink"])
def test_a_cache_that_links_is_refused_before_any_work(folder: Path, link: str) -> None:
    def main(cfg: ExportConfig) -> None:
        raise AssertionError

    config = folder / ".dvc/config"
    config.parent.mkdir()
    config.write_text(f"[cache]\n    type = reflink,{link},copy\n")
    with pytest.raises(SystemExit) as raised:
        _run(main, "export", params(), params())
    assert f"cache.type is reflink,{link},copy: onnx refuses weights" in str(raised.value.code)
    config.write_text("[cache]\n    type = reflink,copy\n")
    with pytest.raises(AssertionError):
        _run(main, "export", params(), params())


def test_a_failure_is_left_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a stage's log would lie in the repository's own artifacts/
    failures = tmp_path / "failures"
    failures.mkdir()
    monkeypatch.setenv("DIFFUSION_ENGINES_FAILURES", str(failures))
    monkeypatch.setenv("DVC_STAGE", "build@cpu-unet")

    def refuse(cfg: Nothing) -> None:
        raise HardwareError("no such GPU", expected="H100", found="none", fix="take another")

    given = {"engine": "cpu-unet", "engines": {"cpu-unet": {"target": "cpu"}}}
    with pytest.raises(SystemExit) as raised:
        _run(refuse, "build", given)
    assert raised.value.code == "\nbuild failed: no such GPU"  # the rest is said at the end
    (failure,) = read_failures(failures)
    assert failure == Failure(
        "build@cpu-unet", "cpu", "HardwareError", "no such GPU", "H100", "none", "take another"
    )
    assert failure.waits_for_hardware

    def surprise(cfg: Nothing) -> None:
        raise RuntimeError("surprise")

    with pytest.raises(RuntimeError):
        _run(surprise, "build", given)
    (failure,) = read_failures(failures)
    assert failure.problem == "RuntimeError: surprise (its traceback stands above)"
    assert not failure.waits_for_hardware

    def succeed(cfg: Nothing) -> None:
        (failure,) = read_failures(failures)
        assert "ended without a word" in failure.problem  # were it killed now

    _run(succeed, "build", given)
    assert read_failures(failures) == []


def graph(folder: Path) -> None:
    """Write an exported graph as the stage `export` does, of one operator."""
    folder.mkdir(parents=True)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[2,3] input_0) => (float[2,3] output_0)'
        " { output_0 = Relu (input_0) }"
    )
    onnx.save(model, folder / "model.onnx")
    manifests.write(folder, graph_manifest())


def write_reference(folder: Path, model: Path, *, error: float = 0.0) -> None:
    """Record two calls of a graph, as the stage `reference` does of a network."""
    session = session_of(model)
    name = session.get_inputs()[0].name

    def network(tensor: torch.Tensor) -> torch.Tensor:
        (output,) = session.run(None, {name: tensor.numpy()})
        return torch.from_numpy(output) * (1 + error)

    recorder = Recorder(network)
    for _ in range(2):
        # Positive: six negative numbers, once in 64 draws, leave Relu nothing to compare.
        recorder(torch.rand(session.get_inputs()[0].shape))
    folder.mkdir(parents=True, exist_ok=True)
    recorder.save(folder / "unet.safetensors")
    manifests.write(folder, manifests.Reference(2))


def test_a_graph_that_computes_something_else_than_pytorch_is_no_graph_to_build_from(
    tmp_path: Path,
) -> None:
    (tmp_path / "stages").mkdir()
    script = Path(shutil.copy(ROOT / "stages/simplify.py", tmp_path / "stages"))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    exported = tmp_path / "artifacts/exports/unet-fp32"
    graph(exported)
    write_reference(tmp_path / "artifacts/reference", exported / "model.onnx", error=0.01)

    failed = run_script(script, "graph=unet-fp32")

    assert failed.returncode == 1
    assert "the graph unet-fp32 computes something else than PyTorch" in failed.stderr
    assert "unet-fp32, call 1: rel_l2 9.9" in failed.stderr
    found = read_graph_check(tmp_path / "artifacts/parity/unet-fp32")
    assert found.worst is not None
    assert found.worst.rel_l2 == pytest.approx(0.0099, rel=0.01)  # written before it fails


def test_simplify_leaves_the_terminal_to_what_matters(tmp_path: Path) -> None:
    """onnxsim's extension reports what it calls leaks if Python does not clean up at its end."""
    (tmp_path / "stages").mkdir()
    script = Path(shutil.copy(ROOT / "stages/simplify.py", tmp_path / "stages"))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    exported = tmp_path / "artifacts/exports/unet-fp32"
    graph(exported)
    write_reference(tmp_path / "artifacts/reference", exported / "model.onnx")
    done = run_script(script, "graph=unet-fp32")
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "artifacts/onnx/unet-fp32/manifest.json")["compared"] is True
    assert done.stderr == ""
    (exported / "model.onnx").write_bytes(b"garbage")
    manifests.write(exported, graph_manifest())
    failed = run_script(script, "graph=unet-fp32")
    assert failed.returncode == 1
    assert "onnxsim could not simplify" in failed.stderr
    assert "leaked" not in failed.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
@pytest.mark.parametrize("under_dvc", [True, False])
def test_a_stage_ends_with_its_parent_under_dvc_alone(tmp_path: Path, under_dvc: bool) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "stages/slow.py").write_text(
        "import os, time\n"
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from diffusion_engines.stage import stage\n"
        "@dataclass(frozen=True)\n"
        "class Config: pass\n"
        "@stage\n"
        "def main(cfg: Config) -> None:\n"
        "    Path('pid').write_text(str(os.getpid()))\n"
        "    time.sleep(4)\n"
        "    Path('ended').touch()\n"
        "main()\n"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys; from pathlib import Path\n"
            "from tests.unit.test_runs import record\n"
            "record(Path(sys.argv[1]), os.getpid())\n"
            "subprocess.run([sys.executable, sys.argv[1] + '/stages/slow.py'])\n",
            str(tmp_path),
        ],
        cwd=ROOT,
        env=os.environ | ({"DVC_STAGE": "slow"} if under_dvc else {}),
    )
    pid = tmp_path / "pid"
    assert wait_for(lambda: pid.exists() and pid.read_text())
    parent.kill()
    parent.wait()
    assert wait_for(lambda: is_gone(int(pid.read_text())))
    assert (tmp_path / "ended").exists() != under_dvc


def test_an_orphan_does_no_work(tmp_path: Path) -> None:
    """dvc was killed while the script was loading: a process that runs no stage has adopted it."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    script = Path(shutil.copy(ROOT / "stages/simplify.py", tmp_path / "stages"))
    done = subprocess.run(
        [sys.executable, script, "graph=unet-fp32"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"DVC_STAGE": "simplify@unet-fp32"},
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "dvc was killed"
