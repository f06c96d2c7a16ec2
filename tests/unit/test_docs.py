"""What the Markdown files say holds: links, commands, overrides, tables, and Python that runs."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_engines.arguments import hydra_arguments
from diffusion_engines.compose import compose_params
from diffusion_engines.config import SECTIONS
from diffusion_engines.layout import Workspace
from diffusion_engines.params import selector
from tests.conftest import ROOT, stage_config

README = ROOT / "README.md"
PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "models/**/*.md", "loras/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """What stands between backticks in the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Headings, as web pages of repositories name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def words(line: str) -> list[list[str]]:
    """The commands of a line of shell, each as its words."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page that this repository has a say in, as their words."""
    lines = [
        line.removeprefix("$ ")
        for language, block in FENCE.findall(page.read_text())
        if language == ""
        for line in block.replace("\\\n", " ").splitlines()
    ]
    tools = ("make", "python", "dvc", "diffusion-engines")
    for line in [*lines, *spans(page)]:
        if ("…" in line and not line.startswith("git clone")) or line.endswith(":"):
            continue  # a part of one, or an output
        if line.startswith((*(f"{tool} " for tool in tools), "git ")):
            yield from (command for command in words(line) if command and command[0] in tools)


# The changelog also names what was.
COMMANDS = [c for page in PAGES if page.name != "CHANGELOG.md" for c in commands(page)]


def commands_of(*start: str) -> list[list[str]]:
    """Every command that begins so, once."""
    found = {tuple(command) for command in COMMANDS if tuple(command[: len(start)]) == start}
    return [list(command) for command in sorted(found)]


def joined(command: list[str]) -> str:
    return " ".join(command)


def test_the_pages_have_commands() -> None:
    """Else a change of the parser above would switch the tests below off."""
    assert len(commands_of("make")) > 30
    assert len(commands_of("dvc", "exp", "run")) > 8
    assert len(commands_of("python")) > 6
    assert len(commands_of("diffusion-engines")) >= 3


def test_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        found = page.parent / path if path else page
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_readme_links_every_page_of_docs() -> None:
    linked = set(re.findall(r"\]\((docs/[\w.-]+\.md)", README.read_text()))
    assert linked == {name_of(page) for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("fleet", "fleet"),
        ("model", "models"),
        ("stage", "stages"),
        ("sweep", "sweeps"),
        ("pick", "sweeps"),
    ],
)
def test_tables_list_every_option(kind: str, page: str) -> None:
    if kind == "stage":
        names = set(STAGES)
    else:
        names = {path.stem for path in (ROOT / "conf" / kind).glob("*.yaml")}
    text = (ROOT / "docs" / f"{page}.md").read_text()
    listed = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    missing = names - set(re.findall(r"`([\w-]+)`", " ".join(listed)))
    assert not missing - {"tiny", "sd14-synthetic"}  # for the tests; said in the text


@pytest.mark.parametrize("command", commands_of("make"), ids=joined)
def test_make_has_the_target(command: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [word for word in command[1:] if "=" not in word]
    assert named
    assert set(named) <= set(targets)


@pytest.mark.parametrize("command", commands_of("make", "measure"), ids=joined)
def test_what_is_measured_is_a_target(command: list[str]) -> None:
    (target,) = [word.removeprefix("TARGET=") for word in command if word.startswith("TARGET=")]
    assert (ROOT / "conf" / "target" / f"{target}.yaml").is_file()


@pytest.mark.parametrize("command", commands_of("make", "sweep"), ids=joined)
def test_what_is_swept_is_a_file(command: list[str]) -> None:
    for name in [word.removeprefix("SWEEP=") for word in command if word.startswith("SWEEP=")]:
        assert (ROOT / "conf" / "sweep" / f"{name}.yaml").is_file()


def overrides(command: list[str]) -> list[list[str]]:
    """The overrides of a command that composes conf/; a list for each point of a sweep."""
    if command[0] == "make":
        (arguments,) = [word for word in command if word.startswith("ARGS=")] or ["ARGS="]
        return [shlex.split(arguments.removeprefix("ARGS="))]
    if command[0] == "diffusion-engines":
        return [[word for word in command[2:] if not word.startswith("--")]]
    from dvc.utils.hydra import get_hydra_sweeps

    given = [value for flag, value in itertools.pairwise(command) if flag == "-S"]
    return [point["params.yaml"] for point in get_hydra_sweeps({"params.yaml": given})]


def compositions() -> Iterator[tuple[str, ...]]:
    some_model = f"model.folder={ROOT}/conf/architecture/sd14"
    for command in [
        *commands_of("make", "repro"),
        *commands_of("make", "params"),
        *commands_of("make", "plan"),
        *commands_of("dvc", "exp", "run"),
        *commands_of("diffusion-engines", "repro"),
        *commands_of("diffusion-engines", "plan"),
    ]:
        if "export.opst=20" not in joined(command):  # the example of a mistake
            for point in overrides(command):
                yield tuple(word.replace("model.folder=/path", some_model) for word in point)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to compose in: params.yaml is written there, all else is this repository's."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("conf", "hydra_plugins", "models", "loras"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("given", sorted(set(compositions())), ids=" ".join)
def test_overrides_compose(given: tuple[str, ...], repository: Path) -> None:
    compose_params([*given], repository)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_exist(page: Path) -> None:
    text = " ".join([*spans(page), *(block for _, block in FENCE.findall(page.read_text()))])
    for group, options in re.findall(r"(?<![\w.@/])([a-z]+)=([a-z][\w,-]*)", text):
        if (folder := ROOT / "conf" / group).is_dir():
            known = {path.stem for path in folder.glob("*.yaml")}
            assert set(options.rstrip(",").split(",")) <= known, f"{group}={options}"


@pytest.mark.parametrize("command", commands_of("python"), ids=joined)
def test_scripts_take_their_arguments(command: list[str]) -> None:
    script, *given = command[1:]
    if script == "-c":
        compile(given[0], joined(command), "exec")
        return
    if script == "-m":
        assert importlib.util.find_spec(given[0])
        assert all((ROOT / word).exists() for word in given if word.startswith("tests/"))
        return
    assert (ROOT / script).is_file()
    if not script.startswith("stages/"):
        return
    stage = Path(script).stem
    picked = selector(stage_config(stage))
    settings = [word for word in given if "=" in word]
    names = {picked[0]} if picked else set()
    for argument in hydra_arguments(settings, names, stage, SECTIONS.get(stage)):
        key, _, value = argument.partition("=")
        if key.startswith("+"):
            assert picked
            assert value in PARAMS[picked[1]]
            continue
        node = PARAMS
        for part in key.split("."):
            assert part in node, argument
            node = node[part]


@pytest.mark.parametrize("command", commands_of("dvc", "repro"), ids=joined)
def test_dvc_has_the_stages(command: list[str]) -> None:
    for word in command[2:]:
        if word.startswith("-"):
            continue
        stage, _, item = word.partition("@")
        assert stage in STAGES
        if stage in ("build", "wrap"):  # h100 and timing are of fleets other than the default
            named = [key for key in PARAMS["engines"] if fnmatch.fnmatch(key, item)]
            assert named or (ROOT / "conf" / "target" / f"{item.split('-')[0]}.yaml").is_file()


def console_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run the console script in this process; return its exit status."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["diffusion-engines"].partition(":")
    monkeypatch.setattr(sys, "argv", ["diffusion-engines", *arguments])
    with pytest.raises(SystemExit) as raised:
        getattr(importlib.import_module(module), function)()
    return raised.value.code


@pytest.mark.parametrize(
    "subcommand", sorted({command[1] for command in commands_of("diffusion-engines")})
)
def test_the_console_script_has_the_subcommand(
    subcommand: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not console_script(monkeypatch, subcommand, "--help")
    assert subcommand in capsys.readouterr().out


def test_the_console_script_refuses_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console_script(monkeypatch, "no-such-thing", "--help")


def python_blocks(page: Path) -> list[str]:
    return [block for language, block in FENCE.findall(page.read_text()) if language == "python"]


SERVING = python_blocks(ROOT / "docs" / "serving.md")


@pytest.fixture
def workspace(tiny_bundles: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundles, Workspace(tmp_path).bundles("cpu"))
    return tmp_path


def run_block(call: str, folder: Path) -> str:
    (code,) = [block for block in SERVING if call in block]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_serving_example_paints_what_diffusers_paints(
    workspace: Path, tiny_weights: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    (code,) = [block for block in SERVING if "load_pipeline(" in block]
    assert len([line for line in code.splitlines() if line]) <= 10
    run_block("load_pipeline(", workspace)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_weights, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        "A big banana leaf with lemons in front of it",
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(42),
    ).images
    found = np.asarray(Image.open(workspace / "lemons.png")).astype(int)
    assert found.std() > 2
    assert np.abs(found - np.asarray(expected)).max() <= 1


def test_the_component_example_prints_what_an_engine_takes(workspace: Path) -> None:
    printed = run_block("load_component(", workspace).splitlines()
    assert printed == [
        "latents (batch 2, channels 4, height 16, width 16)",
        "timestep (steps 1)",
        "text embeddings (batch 2, tokens 77, features 32)",
    ]


def test_every_python_block_is_run_here() -> None:
    assert len(SERVING) == 2
    blocks = [block for page in PAGES for block in python_blocks(page)]
    # The one for TensorRT needs a GPU (docs/verified.md); lemon's is the other half of what the
    # serving example is compared with, and README's is the beginning of that example.
    others = [b for b in blocks if b not in SERVING and "torch_tensorrt" not in b]
    lemon, readme = sorted(others, key=lambda block: "load_pipeline" in block)
    assert "StableDiffusionPipeline.from_pretrained(" in lemon
    assert set(readme.splitlines()) <= set("\n".join(SERVING).splitlines())
