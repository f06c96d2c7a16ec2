"""What any clone needs is kept, and nothing goes before a person has seen what."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.repo import Repo

from diffusion_engines import cli
from diffusion_engines.errors import ConfigError, IntegrityError
from diffusion_engines.garbage.asking import bytes_from_text
from diffusion_engines.garbage.collecting import Collection, collect, renew_lease
from diffusion_engines.garbage.leases import lease_of, read_leases, write_lease

# DVC 3.67 with pygtrie 2.5, inside of this process.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

SIZE = 1000
OLD = 30 * 24 * 3600
# A folder of one file, which is the content of `version` over and over.
SCRIPT = f"""\
from pathlib import Path
Path("out").mkdir()
Path("out/engine").write_text(Path("version").read_text().strip() * {SIZE})
"""


class Clone:
    """A repository of git and DVC with one stage, whose cache and remote lie beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=self.path, check=True, capture_output=True, text=True
        ).stdout

    def build(self, version: str, *, commit: bool = True) -> None:
        (self.path / "version").write_text(version)
        with contextlib.chdir(self.path), Repo(str(self.path)) as repo:
            repo.reproduce()
        if commit:
            self.git("add", "-A")
            self.git("commit", "-qm", version)

    def push(self) -> None:
        with Repo(str(self.path)) as repo:
            repo.push()

    def versions(self, where: str = "cache") -> str:
        """The versions whose engines are in the cache or on the remote, one letter each."""
        files = (self.path.parent / where / "files/md5").glob("??/*")
        return "".join(sorted(path.read_text()[0] for path in files if path.suffix != ".dir"))

    def age(self, where: str = "cache", *, seconds: float = OLD) -> None:
        """Let what is there have been written earlier: the earlier, the smaller its version."""
        for path in (self.path.parent / where / "files/md5").glob("??/*"):
            then = time.time() - seconds + ord(path.read_text()[0])
            os.utime(path, (then, then))

    def collect(self, **options: int | float | bool | None) -> Collection:
        return collect(self.path, lambda _: True, **options)  # type: ignore[arg-type]


@pytest.fixture
def clone(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """A clone that has built and pushed `a`, in no commit any more, and `b`; both are old."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "clone")
    return Clone(tmp_path / "clone")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a clone, its cache and its remote."""
    made = Clone(tmp_path_factory.mktemp("garbage") / "clone")
    made.path.mkdir()
    made.git("init", "-qb", "main")
    Repo.init(str(made.path)).close()
    (made.path / ".dvc/config").write_text(
        "[core]\n    remote = shared\n[cache]\n    dir = ../../cache\n"
        "['remote \"shared\"']\n    url = ../../remote\n"
    )
    (made.path / ".gitignore").write_text("/release/\n/out\n")
    (made.path / "make.py").write_text(SCRIPT)
    (made.path / "dvc.yaml").write_text(
        "stages: {make: {cmd: python make.py, deps: [make.py, version], outs: [out]}}\n"
    )
    made.build("a", commit=False)
    made.push()
    made.build("b")
    made.push()
    made.age()
    made.age("remote")
    return made.path.parent


def test_what_no_commit_has_goes(clone: Clone) -> None:
    found = clone.collect()
    assert clone.versions() == "b"
    assert {one.output for one in found.drop} == {"out"}
    assert SIZE <= found.freed < 2 * SIZE
    assert clone.versions("remote") == "ab"
    with Repo(str(clone.path)) as repo:
        assert repo.status() == {}


def test_of_the_remote_alone(clone: Clone) -> None:
    clone.collect(remote=True)
    assert (clone.versions(), clone.versions("remote")) == ("ab", "b")
    # DVC's own list of what the remote has would let it skip this.
    clone.build("a", commit=False)
    clone.push()
    assert clone.versions("remote") == "ab"


@pytest.mark.parametrize("refusal", ["no", "what is young"])
def test_nothing_goes_unasked_or_young(clone: Clone, refusal: str) -> None:
    if refusal == "no":
        found = collect(clone.path, lambda _: False)
        assert found.drop
    else:
        clone.age(seconds=3600)
        found = clone.collect()
        assert (found.drop, found.young) == ((), found.unneeded)
        assert found.unneeded > SIZE
    assert clone.versions() == "ab"


def branch(clone: Clone) -> None:
    clone.git("branch", "other")


def fetched(clone: Clone) -> None:
    clone.git("update-ref", "refs/remotes/origin/theirs", "HEAD")


def tag(clone: Clone) -> None:
    clone.git("tag", "-am", "annotated", "v1")


def experiment(clone: Clone) -> None:
    clone.git("update-ref", "refs/exps/ab/cdef/name", "HEAD")


def release(clone: Clone) -> None:
    receipt = clone.path / "release/cpu/receipt.json"
    receipt.parent.mkdir(parents=True)
    receipt.write_text(json.dumps({"commit": clone.git("rev-parse", "HEAD").strip()}))


REFS: dict[str, Callable[[Clone], None]] = {
    "branch": branch,
    "branch of others": fetched,
    "tag": tag,
    "experiment": experiment,
    "release": release,
}


@pytest.mark.parametrize("keep", [*REFS.values(), None], ids=[*REFS, "nothing"])
def test_what_has_a_name_stays(clone: Clone, keep: Callable[[Clone], None] | None) -> None:
    """`b` has one, and main goes on to `c`; with none, `b` goes: a commit is not enough."""
    if keep:
        keep(clone)
    clone.build("c")
    clone.age()
    clone.collect()
    assert clone.versions() == ("bc" if keep else "c")


@pytest.mark.parametrize("remote", [False, True], ids=["cache", "remote"])
def test_what_another_clone_needs_stays(clone: Clone, remote: bool, tmp_path: Path) -> None:
    """The trap of treeverse/dvc#2325: what is in use elsewhere is garbage here."""
    clone.git("clone", "-q", str(clone.path), str(tmp_path / "other"))
    other = Clone(tmp_path / "other")
    other.build("a", commit=False)  # restored from the run-cache
    renew_lease(other.path, remote=remote)
    clone.age("remote" if remote else "cache")
    found = clone.collect(remote=remote)
    assert clone.versions("remote" if remote else "cache") == "ab"
    assert [lease.where.endswith(":" + str(other.path)) for lease in found.leases] == [True]
    # Where it needs it no more, it goes.
    other.build("b", commit=False)
    renew_lease(other.path, remote=remote)
    clone.collect(remote=remote)
    assert clone.versions("remote" if remote else "cache") == "b"


def test_a_lease_that_comes_while_a_person_thinks(clone: Clone) -> None:
    with Repo(str(clone.path)) as repo:
        odb = repo.cache.local
        everything = set(odb.all())

    def agrees(found: Collection) -> bool:
        lease = lease_of(clone.path.parent, everything)
        write_lease(odb, lease)
        return bool(found.drop)

    collect(clone.path, agrees)
    assert clone.versions() == "ab"
    assert len(read_leases(odb)) == 2


@pytest.mark.parametrize(("budget", "left"), [(10 * SIZE, "abc"), (5 * SIZE // 2, "bc"), (0, "c")])
def test_the_oldest_go_until_the_budget_holds(clone: Clone, budget: int, left: str) -> None:
    clone.build("c")  # so that both of the others are needed no more
    clone.age()
    clone.collect(budget=budget)
    assert clone.versions() == left


def test_what_is_not_known_stops_it(clone: Clone) -> None:
    lease = clone.path.parent / "cache/leases/0.json"
    lease.parent.mkdir()
    lease.write_text('{"format": 1, "clone"')
    with pytest.raises(IntegrityError, match="lease"):
        clone.collect()
    lease.unlink()
    lock = clone.path / "dvc.lock"
    lock.write_text(f"<<<<<<< ours\n{lock.read_text()}")
    with pytest.raises(ConfigError, match="merge-lock"):
        clone.collect()
    assert clone.versions() == "ab"


def test_branches_that_were_not_fetched_stop_it(clone: Clone, tmp_path: Path) -> None:
    clone.git("clone", "-q", "--bare", str(clone.path), str(tmp_path / "origin"))
    clone.git("remote", "add", "origin", str(tmp_path / "origin"))
    clone.git("clone", "-q", str(tmp_path / "origin"), str(tmp_path / "other"))
    other = Clone(tmp_path / "other")
    other.build("c")
    other.git("push", "-q", "origin", "HEAD:theirs")
    with pytest.raises(ConfigError, match="refs/heads/theirs"):
        clone.collect(remote=True)
    clone.git("fetch", "-q", "origin")
    clone.collect(remote=True)
    assert clone.versions("remote") == "b"


def test_no_remote_and_one_that_is_away(clone: Clone) -> None:
    config = clone.path / ".dvc/config"
    text = config.read_text()
    config.write_text(text.replace("remote = shared", "no_scm = false"))
    with pytest.raises(ConfigError, match="no remote"):
        clone.collect(remote=True)
    (clone.path.parent / "file").touch()
    config.write_text(text.replace("../../remote", "../../file/remote"))
    with pytest.raises(ConfigError, match="gave an error"):
        clone.collect(remote=True)


def test_a_copied_folder_is_another_clone(clone: Clone, tmp_path: Path) -> None:
    names = {lease_of(clone.path, set()).clone, lease_of(clone.path, set()).clone}
    clone.path.rename(tmp_path / "moved")
    assert len(names | {lease_of(tmp_path / "moved", set()).clone}) == 2


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 2e11), ("1.5 TB", 1.5e12), ("500m", 5e8), ("12", 12)]
)
def test_sizes(text: str, size: float) -> None:
    assert bytes_from_text(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1EB", "1 000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        bytes_from_text(text)


def test_the_command(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(remote=False, budget="1GB", grace=None, yes=False)
    cli._gc(options)
    assert "Nothing is to be dropped" in capsys.readouterr().out
    options.budget = None
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        with pytest.raises(ConfigError, match="--yes"):
            cli._gc(options)
    assert clone.versions() == "ab"
    options.yes = True
    cli._gc(options)
    out = capsys.readouterr().out
    assert "no other clone has left a lease" in out
    assert "2 objects" in out
    assert out.endswith("dropped\n")
    assert clone.versions() == "b"
