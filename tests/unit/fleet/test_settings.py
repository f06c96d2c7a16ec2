"""The launcher is composed by itself, and changes nothing of params.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_engines.config import conf_digest
from diffusion_engines.errors import ConfigError
from diffusion_engines.fleet.settings import Local, Request, Slurm, launcher_from_overrides
from tests.conftest import ROOT

CONF = ROOT / "conf"


def test_the_default_is_one_job_on_this_machine() -> None:
    found = launcher_from_overrides(CONF, ["model=tiny", "export.opset=20"])
    assert found == (Local("local", 1), ["model=tiny", "export.opset=20"])


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "launcher").glob("*.yaml")))
def test_every_option_composes(name: str) -> None:
    launcher, _ = launcher_from_overrides(CONF, [f"launcher={name}"])
    assert launcher.kind == name


@pytest.mark.parametrize("key", ["jobs", "launcher.jobs"])
def test_a_key_of_the_launcher_needs_no_prefix(key: str) -> None:
    assert launcher_from_overrides(CONF, [f"{key}=3", "launcher=local"])[0] == Local("local", 3)


def test_a_target_takes_what_it_does_not_say_from_the_default() -> None:
    overrides = [
        "launcher=slurm",
        "launcher.targets.a10.partition=x",
        "launcher.targets.new.cpus=9",
    ]
    launcher, rest = launcher_from_overrides(CONF, overrides)
    assert isinstance(launcher, Slurm)
    assert rest == []
    assert launcher.request("a10") == Request("x", "a10", "gpu:1", 240, 4)
    assert launcher.request("new") == Request(None, None, None, 240, 9)
    assert launcher.request("rtx") == launcher.default


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launcher=lsf"], "Could not find 'launcher/lsf'"),
        (["jobs=0"], "launcher.jobs: input should be greater than 0"),
        (["jobs=many"], "launcher.jobs: input should be a valid integer, found 'many'"),
        (["launcher=slurm", "jobs=2"], "launcher.jobs: unknown key (conf/launcher/)"),
        (["launcher=slurm", "launcher.targets.a10.mem=1"], "launcher.targets.a10.mem: unknown key"),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        launcher_from_overrides(CONF, overrides)
    assert said in str(raised.value)


def test_the_digest_of_conf_leaves_the_launcher_out(tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target/launcher.yaml").write_text("x: 1\n")
    before = conf_digest(tmp_path)
    (tmp_path / "launcher/slurm.yaml").write_text("kind: slurm\n")
    assert conf_digest(tmp_path) == before
    (tmp_path / "target/launcher.yaml").write_text("x: 2\n")
    assert conf_digest(tmp_path) != before
