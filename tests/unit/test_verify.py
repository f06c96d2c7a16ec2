"""A damaged cache is named and mended: DVC itself looks at none of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from diffusion_engines.errors import ConfigError
from diffusion_engines.verify import Report, verify_cache

# DVC 3.67 with pygtrie 2.5, inside of this process.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

WEIGHTS = b"w" * 100_000
# Writes a folder, beside it a file, and a line into `log` each time that it runs.
SCRIPT = f"""\
from pathlib import Path
Path("out/sub").mkdir(parents=True)
Path("out/sub/weights").write_bytes({WEIGHTS[:1]!r} * {len(WEIGHTS)})
Path("out/other").write_text("other")
Path("one").write_text("one")
with open("log", "a") as log: log.write("ran\\n")
"""


def write(path: Path, content: bytes) -> None:
    """Change an object as a bad disk does: DVC's read-only mode stays."""
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    write(path, bytes(content))


def truncate(path: Path) -> None:
    write(path, path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "a truncated file": truncate,
    "a missing file": Path.unlink,
}


@dataclass(frozen=True)
class Project:
    """A DVC repository of one stage that has run, and a remote that has its results."""

    path: Path

    def object(self, name: str, where: str = ".dvc/cache/files/md5") -> Path:
        """Return the object of `weights` or of the folder that it is in."""
        oid = self.folder if name == "folder" else hashlib.md5(WEIGHTS).hexdigest()
        return self.path / where / oid[:2] / oid[2:]

    @property
    def folder(self) -> str:
        lock = yaml.safe_load((self.path / "dvc.lock").read_text())
        (out,) = (out for out in lock["stages"]["make"]["outs"] if out["path"] == "out")
        return out["md5"]

    @property
    def runs(self) -> int:
        return len((self.path / "log").read_text().splitlines())

    @property
    def weights(self) -> bytes:
        return (self.path / "out/sub/weights").read_bytes()

    def restore(self) -> None:
        """Remove the outputs, and check out what the cache has."""
        shutil.rmtree(self.path / "out")
        with Repo(str(self.path)) as repo:
            repo.checkout(force=True, allow_missing=True)

    def repro(self) -> None:
        with Repo(str(self.path)) as repo:
            repo.reproduce()

    def push(self) -> int:
        with Repo(str(self.path)) as repo:
            return repo.push()

    def verify(self, **options: bool) -> Report:
        return verify_cache(self.path, **options)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project without a remote: see :func:`with_remote`."""
    path = tmp_path / "project"
    path.mkdir()
    monkeypatch.chdir(path)
    Repo.init(str(path), no_scm=True).close()
    (path / "make.py").write_text(SCRIPT)
    (path / "dvc.yaml").write_text(
        "stages: {make: {cmd: python make.py, deps: [make.py], outs: [out, one]}}\n"
    )
    made = Project(path)
    made.repro()
    return made


@pytest.fixture
def with_remote(project: Project) -> Project:
    (project.path / ".dvc/config").write_text(
        "[core]\n    no_scm = true\n    remote = shared\n"
        "['remote \"shared\"']\n    url = ../../remote\n"
    )
    assert project.push() > 0
    return project


def test_a_whole_cache_is_whole(project: Project) -> None:
    report = project.verify(everything=True)
    assert (report.objects, report.bytes > len(WEIGHTS)) == (4, True)
    assert report == Report(objects=report.objects, bytes=report.bytes)


@pytest.mark.parametrize("name", ["weights", "folder"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_good_copy_comes_from_the_workspace(
    project: Project, damage: Callable[[Path], None], name: str
) -> None:
    before = project.object(name).read_bytes()
    damage(project.object(name))
    (found,) = project.verify().findings
    assert found.path == ("out/sub/weights" if name == "weights" else "out")
    assert found.cure == "the workspace"
    assert project.object(name).read_bytes() == before
    assert project.verify().findings == []
    project.restore()
    project.repro()
    assert (project.weights, project.runs) == (WEIGHTS, 1)


@pytest.mark.parametrize("name", ["weights", "folder"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_good_copy_comes_from_the_remote(
    with_remote: Project, damage: Callable[[Path], None], name: str
) -> None:
    project = with_remote
    damage(project.object(name))
    shutil.rmtree(project.path / "out")
    (project.path / "out").mkdir()
    (found,) = [one for one in project.verify().findings if one.oid in _oid(project.object(name))]
    assert found.cure == "the remote"
    project.repro()
    assert (project.weights, project.runs) == (WEIGHTS, 1)
    assert project.verify().findings == []


@pytest.mark.parametrize("name", ["weights", "folder"])
@pytest.mark.parametrize("damage", [flip, truncate], ids=["a flipped bit", "a truncated file"])
def test_what_was_checked_out_from_a_damaged_object_is_made_again(
    project: Project, damage: Callable[[Path], None], name: str
) -> None:
    damage(project.object("weights"))
    project.restore()
    assert project.weights != WEIGHTS
    project.repro()
    assert (project.weights != WEIGHTS, project.runs) == (True, 1)  # DVC sees nothing
    if name == "folder":
        damage(project.object("folder"))
    report = project.verify()
    assert report.left == ["make"]
    assert {found.cure for found in report.findings} == {""}
    project.repro()
    assert (project.weights, project.runs) == (WEIGHTS, 2)
    assert project.verify().findings == []


@pytest.mark.parametrize("damage", [flip, truncate], ids=["a flipped bit", "a truncated file"])
def test_a_damaged_list_of_a_folder_that_is_not_checked_out_is_found(
    project: Project, damage: Callable[[Path], None]
) -> None:
    damage(project.object("folder"))
    shutil.rmtree(project.path / "out")
    report = project.verify()
    assert (report.left, report.absent) == (["make"], [])
    project.repro()
    assert (project.weights, project.runs) == (WEIGHTS, 2)
    assert project.verify().findings == []


def test_a_damaged_copy_on_the_remote_is_no_cure(with_remote: Project) -> None:
    project = with_remote
    for where in (".dvc/cache/files/md5", "../remote/files/md5"):
        flip(project.object("weights", where))
    (project.path / "out/sub/weights").unlink()
    report = project.verify()
    assert report.left == ["make"]
    assert "the remote's own copy is damaged" in report.notes[0]
    assert not project.object("weights").exists()
    project.repro()
    assert (project.weights, project.runs) == (WEIGHTS, 2)


def test_what_the_remote_lacks_is_uploaded_where_it_is_here(with_remote: Project) -> None:
    project = with_remote
    on_remote = project.object("weights", "../remote/files/md5")
    assert project.verify(remote=True).remote == []
    on_remote.chmod(0o644)
    on_remote.unlink()
    assert project.push() == 0  # "Everything is up to date."
    report = project.verify(remote=True)
    assert (report.uploaded, report.remote) == (["out/sub/weights"], [])
    assert on_remote.read_bytes() == WEIGHTS
    on_remote.unlink()
    project.object("weights").unlink()
    (project.path / "out/sub/weights").unlink()
    report = project.verify(remote=True)
    assert (report.uploaded, report.remote) == ([], ["out/sub/weights"])


def test_without_a_remote_there_is_none_to_ask(project: Project) -> None:
    with pytest.raises(ConfigError, match="dvc remote add"):
        project.verify(remote=True)


def test_what_nobody_fetched_is_neither_damaged_nor_fetched(with_remote: Project) -> None:
    project = with_remote
    shutil.rmtree(project.path / ".dvc/cache")
    shutil.rmtree(project.path / "out")
    (project.path / "one").unlink()
    report = project.verify()
    assert sorted(report.absent) == ["one", "out"]
    assert report.findings == []
    assert not project.object("weights").exists()


def test_all_looks_at_what_dvc_lock_does_not_name(project: Project) -> None:
    cache = project.path / ".dvc/cache/files/md5"
    stray = cache / "ab" / ("c" * 30)
    stray.parent.mkdir()
    stray.write_bytes(b"damaged")
    assert project.verify().findings == []
    (found,) = project.verify(everything=True).findings
    assert (found.path, found.oid) == ("", "ab" + "c" * 30)
    assert not stray.exists()


def _oid(path: Path) -> str:
    return path.parent.name + path.name
