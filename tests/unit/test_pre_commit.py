"""A commit is checked as `make lint` checks."""

from __future__ import annotations

import re

import yaml

from tests.conftest import ROOT


def test_the_hooks_run_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == [
        line.removeprefix("\t@") for line in recipe.splitlines()
    ]


def test_the_hooks_need_no_network_and_look_at_everything() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    for repository in config["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            assert hook["language"] == "system"
            assert hook["pass_filenames"] is False
            assert re.search(hook["files"], "src/diffusion_engines/errors.py")
            assert re.search(hook["files"], "pyproject.toml")
