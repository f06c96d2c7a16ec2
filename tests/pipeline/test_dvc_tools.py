"""DVC's own commands show what the guide says that they show, of a clone with results."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter

import pytest

from tests.composition import ROOT
from tests.pipeline.conftest import Clone
from tests.tiers import long

pytestmark = [pytest.mark.pipeline, long]

GUIDE = (ROOT / "docs/sweeps.md").read_text()
# Each command of the guide's section with the lines that it is said to print.
SHOWN = {
    command: output.splitlines()
    for command, output in re.findall(r"^\$ (dvc .*)\n((?:(?!```|\$ ).*\n)+)", GUIDE, re.MULTILINE)
}
# What the clone here has in place of the guide's two experiments.
REVISIONS = {"precision-fp32": "HEAD", "precision-int8": "other"}
# Of components that the clone's fleet does not build.
OTHERS = ("text_encoder", "vae_decoder")


@pytest.fixture(scope="module")
def history(finished: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with an experiment: another precision, and metrics half as large again."""
    clone = finished.copy(tmp_path_factory.mktemp("history") / "clone")
    clone.compose("fleet.cpu.precision=fp16")
    for path in (clone.path / "artifacts/metrics").rglob("*.json"):
        found = json.loads(path.read_text())
        path.unlink()  # DVC's own are read-only
        path.write_text(json.dumps({name: (value or 0) * 1.5 for name, value in found.items()}))
    clone.run("dvc", "exp", "save", "--force", "--name", "other")
    clone.run("git", "checkout", "-q", ".")
    return clone


def printed(clone: Clone, command: str) -> list[str]:
    words = [REVISIONS.get(word, word) for word in shlex.split(command.partition(" | ")[0])]
    return clone.run(*words).output.splitlines()


def columns(line: str) -> list[str]:
    cells = line.strip("| ").split("|") if "|" in line else re.split(r"\s{2,}", line)
    return [REVISIONS.get(cell.strip(), cell.strip()) for cell in cells if cell.strip() not in "…"]


def test_the_guide_shows_each_of_dvcs_tools() -> None:
    kinds = {" ".join(command.split()[1:3]) for command in SHOWN}
    assert {"exp show", "metrics diff", "params diff", "plots diff"} <= kinds
    assert sum(command.startswith("dvc dag") for command in SHOWN) == 2


@pytest.mark.parametrize("command", [name for name in SHOWN if "exp show" in name])
def test_the_table_has_the_metrics_and_what_differs(history: Clone, command: str) -> None:
    found = columns(printed(history, command)[0])
    wanted = {name for name in columns(SHOWN[command][0]) if not name.startswith(OTHERS)}
    assert wanted <= set(found)
    assert not [name for name in found if "/" in name or name.startswith("graphs.")]


@pytest.mark.parametrize("command", [name for name in SHOWN if "metrics diff" in name])
def test_each_metric_of_the_guide_is_one(history: Clone, command: str) -> None:
    header, *rows = printed(history, command)
    assert columns(header) == columns(SHOWN[command][0])
    wanted = {line.split()[0] for line in SHOWN[command][1:]} - {"…"}
    found = {row.split()[0]: columns(row) for row in rows}
    assert {name for name in wanted if not name.startswith(OTHERS)} <= found.keys()
    assert 0 < float(found["unet_rel_l2"][1]) < 1e-4  # and not rounded to zero


@pytest.mark.parametrize("command", [name for name in SHOWN if "params diff" in name])
def test_what_a_person_wrote_is_what_is_left(history: Clone, command: str) -> None:
    header, *rows = printed(history, command)
    assert columns(header) == columns(SHOWN[command][0])
    left_out = re.search(r"grep -vE '(.*)'", command)
    assert left_out
    left = [columns(row) for row in rows if not re.search(left_out[1], row)]
    assert left == [["params.yaml", "fleet.cpu.precision", "fp32", "fp16"]]


@pytest.mark.parametrize("command", [name for name in SHOWN if "plots diff" in name])
def test_the_plots_have_the_lines_and_bars_of_both(history: Clone, command: str) -> None:
    assert printed(history, command)[-1].startswith("file:///")
    assert history.run("git", "status", "--porcelain").output == ""
    found = json.loads(history.run("dvc", "plots", "diff", "--json", "HEAD", "other").output)
    data = found["data"]
    pictures = [one for parts in data.values() for one in parts if one["type"] == "image"]
    assert Counter(one["revisions"][0] for one in pictures) == {"HEAD": 2, "other": 2}
    plots = {name: one[0]["content"] for name, one in data.items() if one[0]["type"] == "vega"}
    assert {"denoiser.csv", "latents.csv", "cpu.csv"} == {name.split("/")[-1] for name in plots}
    bars = plots["artifacts/plots/benchmark/cpu.csv"]
    rows = Counter((row["rev"], row["timed"]) for row in bars["data"]["values"])
    assert set(rows.values()) == {1}
    assert len(rows) > 10
    assert "timed" in json.dumps(bars["encoding"])


@pytest.mark.parametrize("command", [name for name in SHOWN if name.startswith("dvc dag")])
def test_the_graph_has_the_stages(history: Clone, command: str) -> None:
    found = printed(history, command)
    assert found[0] == SHOWN[command][0] == "flowchart TD"
    nodes = re.findall(r'\["(.*?)"\]', "\n".join(SHOWN[command]))
    assert nodes
    assert set(nodes) <= set(re.findall(r'\["(.*?)"\]', "\n".join(found)))
