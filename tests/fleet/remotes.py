"""What has to hold on each kind of remote; `test_remotes_s3.py` and `test_remotes_ssh.py` run it.

Who runs it defines the fixture `server`. The promises are those of docs/sharing.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from diffusion_engines.errors import DiffusionEnginesError
from diffusion_engines.remotes.commands import fetch_before_run, pull_outputs, push_outputs
from tests.fleet.line import Line
from tests.fleet.servers import Server, free_port
from tests.pipeline.conftest import ROOT, Clone, Outcome, environment, make_clone
from tests.pipeline.pretence import install_python, reproduce
from tests.waiting import is_gone, wait_for

LARGE = 24 * 2**20
# Writes a folder of a large file and small ones, and a line into `log` each time that it runs.
SCRIPT = f"""\
import random
from pathlib import Path
Path("out").mkdir()
Path("out/large").write_bytes(random.Random(0).randbytes({LARGE}))
for number in range(4):
    Path(f"out/small-{{number}}").write_text(f"small {{number}}")
with open("log", "a") as log: log.write("ran\\n")
"""
LIBRARY = {"PYTHONPATH": str(ROOT / "src")}
# Seconds of silence for which tests of silent remotes wait; in life it is watching.SILENCE.
SILENCE = 6.0
WITHIN = 60.0


@dataclass(frozen=True)
class Project:
    """A DVC repository of one stage, and a line to its remote."""

    path: Path
    server: Server
    said: Path  # what all commands printed

    def run(self, *command: str, check: bool = True) -> Outcome:
        outcome = Clone(self.path).run(*command, check=check, env=LIBRARY)
        self.note(outcome.output)
        return outcome

    def call(self, function: Callable[..., object], **options: float) -> Outcome:
        """Call one of remotes.commands as the console script does."""
        printed, status = io.StringIO(), 0
        with redirect_stdout(printed):
            try:
                print(function(self.path, **options))
            except DiffusionEnginesError as error:
                print(error)
                status = 1
        self.note(printed.getvalue())
        return Outcome(status, printed.getvalue())

    def push(self) -> Outcome:
        return self.call(push_outputs)

    def pull(self) -> Outcome:
        return self.call(pull_outputs)

    def note(self, output: str) -> None:
        with self.said.open("a") as file:
            file.write(output)

    def connect(self, port: int, secrets: dict[str, str]) -> None:
        connect(self.path, replace(self.server, port=port, secrets=secrets))

    @property
    def objects(self) -> dict[str, str]:
        """The objects of the output by the file that they are of; "" is the list of all."""
        lock = yaml.safe_load((self.path / "dvc.lock").read_text())
        (out,) = lock["stages"]["make"]["outs"]
        listed = json.loads(self.on_server(out["md5"]).read_text())
        return {"": out["md5"], **{entry["relpath"]: entry["md5"] for entry in listed}}

    def on_server(self, oid: str) -> Path:
        (found,) = [p for p in object_paths(self.server) if p.parent.name + p.name == oid] or [
            cache_of(self.server) / oid[:2] / oid[2:]
        ]
        return found

    @property
    def cached(self) -> list[Path]:
        return [p for p in (self.path / ".dvc/cache/files").rglob("*") if p.is_file()]

    @property
    def runs(self) -> int:
        log = self.path / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def second(self, path: Path) -> Project:
        """Another person's clone, which has the credentials and nothing built."""
        self.run("git", "clone", "-q", ".", str(path))
        other = Project(path, self.server, self.said)
        connect(path, self.server)
        return other


def cache_of(server: Server) -> Path:
    scheme, _, path = server.url.partition("://")
    folder = server.folder / path if scheme == "s3" else Path(path.removeprefix("127.0.0.1"))
    return folder / "files/md5"


def object_paths(server: Server) -> list[Path]:
    """What lies on the remote under the name of an object."""
    return [
        path
        for path in cache_of(server).rglob("*")
        if path.is_file() and re.fullmatch(r"[0-9a-f]{30}(\.dir)?", path.name)
    ]


def connect(path: Path, server: Server) -> None:
    """Tell DVC of the remote: what is secret, and where tests find it, in `.dvc/config.local`."""
    name, value = server.port_setting
    local = {"url": server.url, **server.secrets, name: value.format(port=server.port)}
    (path / ".dvc/config.local").write_text(
        "['remote \"shared\"']\n" + "".join(f"    {k} = {v}\n" for k, v in local.items())
    )


def add_remote(path: Path, server: Server) -> None:
    settings = {"url": server.url, "verify": "true", **server.settings}
    config = path / ".dvc/config"
    core, _, others = config.read_text().partition("[core]\n")
    config.write_text(
        f"{core}[core]\n    remote = shared\n{others}\n['remote \"shared\"']\n"
        + "".join(f"    {key} = {value}\n" for key, value in settings.items())
    )
    connect(path, server)


@pytest.fixture(scope="module")
def made(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose output is made and committed, and nothing pushed; not to be changed."""
    path = tmp_path_factory.mktemp("made") / "project"
    path.mkdir()
    clone = Clone(path)
    clone.run("git", "init", "-q")
    clone.run("dvc", "init", "-q")
    (path / "make.py").write_text(SCRIPT)
    (path / ".gitignore").write_text("/log\n")
    (path / "dvc.yaml").write_text(
        "stages: {make: {cmd: python make.py, deps: [make.py], outs: [out]}}\n"
    )
    add_remote(path, server)
    clone.run("dvc", "repro", "-q")
    clone.commit()
    return path


@pytest.fixture
def project(made: Path, server: Server, tmp_path: Path) -> Project:
    """A copy of it, and a remote that has nothing."""
    own = replace(server, url=f"{server.url}/{tmp_path.name}")
    shutil.copytree(made, tmp_path / "project", symlinks=True)
    connect(tmp_path / "project", own)
    return Project(tmp_path / "project", own, tmp_path / "said.txt")


@pytest.fixture
def pushed(project: Project) -> Project:
    """And one that has all."""
    project.push()
    return project


@pytest.fixture
def line(server: Server) -> Iterator[Line]:
    line = Line(server.port)
    yield line
    line.close()


@pytest.fixture(scope="module")
def pretended(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone of this repository whose stages pretended to run, all of it pushed."""
    folder = tmp_path_factory.mktemp("pretended")
    install_python(folder / "bin")
    clone = make_clone(folder / "clone")
    add_remote(clone.path, server)
    for heavy in ("docs", "models/lemon"):
        shutil.rmtree(clone.path / heavy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone.path)
        assert "report" in reproduce(clone.path).ran
    clone.commit("built")
    clone.run("diffusion-engines", "push")
    return clone


def repro_counted(pretended: Clone, clone: Clone) -> tuple[Outcome, list[str]]:
    """Run `make repro` in a clone whose stages pretend; return the stages that were executed."""
    ran = clone.path / ".dvc/tmp/ran"
    pretence = json.loads((pretended.path / ".dvc/tmp/pretence.json").read_text())
    (clone.path / ".dvc/tmp").mkdir(exist_ok=True)
    told = clone.path / ".dvc/tmp/pretence.json"
    told.write_text(json.dumps(pretence | {"ran": str(ran)}))
    path = f"{pretended.path.parent / 'bin'}{os.pathsep}{environment()['PATH']}"
    outcome = clone.run(
        *("diffusion-engines", "repro"),
        env={"PATH": path, "PRETENCE": str(told), "SHELL": "/bin/sh"},
    )
    executed = ran.read_text().split() if ran.exists() else []
    ran.unlink(missing_ok=True)
    return outcome, executed


def second_of(pretended: Clone, server: Server, path: Path) -> Clone:
    pretended.run("git", "clone", "-q", ".", str(path))
    connect(path, server)
    return Clone(path)


def probes(executed: list[str]) -> bool:
    return all(stage.startswith("probe") for stage in executed)


def test_a_second_machine_restores_everything(
    pretended: Clone, server: Server, tmp_path: Path
) -> None:
    clone = second_of(pretended, server, tmp_path / "second")

    outcome, executed = repro_counted(pretended, clone)

    assert executed, "the probes look at the machine, so that the counter works"
    assert probes(executed), executed
    for folder in ("bundles", "report", "benchmark"):
        made, restored = (one.path / "artifacts" / folder for one in (pretended, clone))
        names = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
        assert names
        assert all((made / n).read_bytes() == (restored / n).read_bytes() for n in names)
    # The pretence writes the same YAML in another form.
    assert clone.run("git", "status", "--porcelain").output.split() in ([], ["M", "dvc.lock"])
    lock, before = (
        yaml.safe_load((one.path / "dvc.lock").read_text()) for one in (clone, pretended)
    )
    assert lock == before
    assert "objects fetched" in outcome.output


def test_what_is_local_is_built_where_the_remote_is_out_of_reach(
    pretended: Clone, server: Server, tmp_path: Path
) -> None:
    nobody = replace(server, port=free_port())
    clone = second_of(pretended, nobody, tmp_path / "second")

    outcome, executed = repro_counted(pretended, clone)

    assert {"build@cpu-unet", "report"} <= set(executed)
    assert "The remote was skipped" in outcome.output
    assert (clone.path / "artifacts/bundles").is_dir()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        {"large": flip, "small-0": truncate, "small-1": Path.unlink},
        {"": flip},
        {"": Path.unlink},
    ],
    ids=["files", "a damaged list", "a missing list"],
)
def test_a_bad_object_on_the_remote_is_named_made_again_and_replaced(
    pushed: Project, tmp_path: Path, damage: dict[str, Callable[[Path], None]]
) -> None:
    objects = {name: pushed.objects[name] for name in damage}
    for name, oid in objects.items():
        damage[name](pushed.on_server(oid))
    second = pushed.second(tmp_path / "second")

    outcome = second.pull()

    named = {
        word: re.search(f"{word} on the remote.*", outcome.output)
        for word in ("damaged", "missing")
    }
    for name, oid in objects.items():
        line = named["missing" if damage[name] is Path.unlink else "damaged"]
        assert line
        assert f"out/{name}".rstrip("/") in line[0]
        assert not any(path.parent.name + path.name == oid for path in second.cached)
    second.run("dvc", "repro")
    assert second.runs == 1
    second.push()
    for oid in objects.values():
        content = pushed.on_server(oid).read_bytes()
        assert hashlib.md5(content).hexdigest() == oid.removesuffix(".dir")
    third = pushed.second(tmp_path / "third")
    assert third.pull().status == 0
    assert (third.path / "out/large").read_bytes() == (pushed.path / "out/large").read_bytes()


def test_a_push_asks_the_remote_and_not_a_list_of_its_own(project: Project) -> None:
    project.run("dvc", "push")
    large, small = (project.on_server(project.objects[n]) for n in ("large", "small-0"))
    large.unlink()
    small.write_text("")
    assert "up to date" in project.run("dvc", "push").output

    assert "2 objects pushed" in project.push().output

    assert hashlib.md5(large.read_bytes()).hexdigest() == project.objects["large"]
    assert small.read_text() == "small 0"
    assert "0 objects pushed" in project.push().output


def test_a_push_that_is_killed_leaves_nothing_that_looks_whole(
    project: Project, line: Line, tmp_path: Path
) -> None:
    project.connect(line.port, project.server.secrets)
    line.rate = 4 * 2**20
    pushing = subprocess.Popen(
        ["diffusion-engines", "push"],
        cwd=project.path,
        env=environment() | LIBRARY,
        stdout=subprocess.DEVNULL,
    )
    try:
        assert wait_for(lambda: line.passed > LARGE // 4)
    finally:
        pushing.send_signal(signal.SIGKILL)
        pushing.wait()
    time.sleep(1)  # the server closes what it had open
    assert line.passed < LARGE, "it was killed after the transfer"
    project.connect(project.server.port, project.server.secrets)

    for path in object_paths(project.server):
        name = path.parent.name + path.name
        assert hashlib.md5(path.read_bytes()).hexdigest() == name.removesuffix(".dir")
    second = project.second(tmp_path / "second")
    assert second.run("diffusion-engines", "pull", check=False).status == 1
    project.push()
    second.pull()
    assert (second.path / "out/large").stat().st_size == LARGE


@pytest.fixture(params=["nobody there", "refused", "silent", "silent in a transfer", "cut"])
def trouble(request: pytest.FixtureRequest, pushed: Project, line: Line, tmp_path: Path) -> Project:
    """Another clone of a project that is pushed, with a remote that fails in this way."""
    second = pushed.second(tmp_path / "second")
    port, secrets = line.port, pushed.server.secrets
    match request.param:
        case "nobody there":
            port = free_port()
        case "refused":
            secrets = pushed.server.wrong
        case "silent":
            line.go_silent()
        case "silent in a transfer":
            line.go_silent(after=LARGE // 3)
        case "cut":
            line.break_off(after=LARGE // 3)
    second.connect(port, secrets)
    return second


def test_a_remote_that_fails_is_skipped_within_a_minute(trouble: Project) -> None:
    started = time.monotonic()

    outcome = trouble.call(fetch_before_run, silence=SILENCE)

    assert time.monotonic() - started < WITHIN
    assert outcome.output.splitlines()[-1] == "False"
    assert "The remote was skipped" in outcome.output
    assert "Traceback" not in outcome.output
    for path in trouble.cached:
        if path.parent.name != "unfinished":
            name = path.parent.name + path.name
            assert hashlib.md5(path.read_bytes()).hexdigest() == name.removesuffix(".dir")
    assert not any(process_of(trouble))
    trouble.run("dvc", "repro")
    assert trouble.runs == 1


def process_of(project: Project) -> Iterator[int]:
    """Yield the processes that still work in a project."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            here = (folder / "cwd").readlink()
        except OSError:
            continue
        if here == project.path and not is_gone(int(folder.name)):
            yield int(folder.name)


def test_a_push_to_a_silent_remote_ends(project: Project, line: Line) -> None:
    project.connect(line.port, project.server.secrets)
    line.go_silent(after=LARGE // 3)

    outcome = project.call(push_outputs, silence=SILENCE)

    assert outcome.status != 0
    assert "the remote does not answer" in outcome.output


def test_nobody_without_the_key_gets_in(pushed: Project, tmp_path: Path) -> None:
    stranger = pushed.second(tmp_path / "stranger")
    stranger.connect(pushed.server.port, pushed.server.wrong)

    for function in (pull_outputs, push_outputs):
        outcome = stranger.call(function)
        assert outcome.status == 1
        assert "the remote failed" in outcome.output
    assert stranger.cached == []
    stranger.run("dvc", "pull", check=False)
    assert stranger.cached == []

    secrets = [*pushed.server.secrets.values(), *pushed.server.wrong.values()]
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and p.name != "config.local"):
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
    tracked = pushed.run("git", "ls-files").output.split()
    assert ".dvc/config" in tracked
    assert ".dvc/config.local" not in tracked
