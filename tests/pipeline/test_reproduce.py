"""A bundle is made again of its own commit, and what differs is found and judged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusion_engines import manifests
from diffusion_engines.environments import others_here
from diffusion_engines.errors import ConfigError, IntegrityError
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Bundle
from diffusion_engines.reproduction import rebuilding, reproducing
from diffusion_engines.reproduction.differences import differing_files
from diffusion_engines.reproduction.rebuilding import rebuilt
from diffusion_engines.reproduction.recipes import Recipe, find_recipe
from diffusion_engines.reproduction.reproducing import reproduce_bundle
from tests.pipeline.conftest import Clone
from tests.tiers import long

# DVC 3.67 with pygtrie 2.5, inside of this process.
pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning"),
]

BUNDLE = Path("artifacts/bundles/cpu/unet")
DATA = "engine.onnx.data"


@pytest.fixture(scope="module")
def built(finished: Clone) -> tuple[Clone, Recipe]:
    """A clone in which everything is built, and how its bundle was made; not to be changed."""
    return finished, find_recipe(finished.path, finished.path / BUNDLE)


def head(clone: Clone, revision: str = "HEAD") -> str:
    return clone.run("git", "rev-parse", revision).output.strip()


def cached(clone: Clone) -> set[Path]:
    return {path for path in (clone.path / ".dvc/cache").rglob("*") if path.is_file()}


def forge(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change a bundle's weights, and its manifest with them."""
    manifest = manifests.read(folder, Bundle)
    weights = np.fromfile(folder / DATA, np.float32)
    change(weights)
    weights.tofile(folder / DATA)
    manifests.write(folder, manifest)


def test_a_recipe_names_commit_commands_and_versions(built: tuple[Clone, Recipe]) -> None:
    clone, recipe = built
    assert recipe.commit == head(clone)
    assert recipe.committed
    commands = {step.name: step.command for step in recipe.steps}
    assert list(commands) == [
        "export@unet-fp32",
        "simplify@unet-fp32",
        "build@cpu-unet",
        "wrap@cpu-unet",
    ]
    assert commands["build@cpu-unet"] == "python stages/build.py +engine=cpu-unet"
    assert set(recipe.taken) == {"check_conf", "download", "reference"}
    assert recipe.params == (clone.path / "params.yaml").read_text()
    fingerprints = {"artifacts/fingerprints/cpu.json", "artifacts/fingerprints/cpu-wrap.json"}
    assert set(recipe.records) == fingerprints
    made = {step.name.partition("@")[0]: step.environment for step in recipe.steps}
    assert all(environment is not None for environment in made.values())
    assert others_here(filter(None, made.values())) == []
    for stage, library in (("export", "torch"), ("simplify", "onnxsim"), ("build", "onnxruntime")):
        environment = made[stage]
        assert environment is not None
        assert library in environment.libraries
        # The code was committed before it ran; dvc.lock was not yet.
        assert (environment.commit, environment.clean) == (head(clone, "HEAD~1"), True)


def test_a_later_commit_changes_neither_bundle_nor_recipe(
    built: tuple[Clone, Recipe], clone: Clone, tmp_path: Path
) -> None:
    (_, before), first = built, head(clone)
    clone.edit("README.md", "# diffusion-engines", "# engines")
    clone.commit("readme")
    copy = shutil.copytree(clone.path / BUNDLE, tmp_path / "anywhere")
    assert find_recipe(clone.path, copy) == before
    assert before.commit == first != head(clone)


def test_what_nobody_has_committed_is_of_the_working_copy(clone: Clone) -> None:
    clone.run("git", "reset", "-q", "--mixed", "HEAD~1")
    clone.run("git", "reflog", "expire", "--expire=now", "--all")

    recipe = find_recipe(clone.path, clone.path / BUNDLE)
    assert (recipe.commit, recipe.committed, recipe.clean) == (head(clone), False, True)
    clone.edit("src/diffusion_engines/files.py", "import csv", "import csv  # edited")
    assert not find_recipe(clone.path, clone.path / BUNDLE).clean


def test_a_damaged_or_foreign_bundle_is_refused(
    built: tuple[Clone, Recipe], tmp_path: Path
) -> None:
    clone, _ = built
    copy = shutil.copytree(clone.path / BUNDLE, tmp_path / "unet")
    content = bytearray((copy / DATA).read_bytes())
    content[0] ^= 1
    (copy / DATA).write_bytes(content)
    with pytest.raises(IntegrityError, match="is damaged"):
        reproduce_bundle(clone.path, copy)
    manifests.write(copy, manifests.read(clone.path / BUNDLE, Bundle))
    with pytest.raises(ConfigError, match="was not made by any state of this repository"):
        reproduce_bundle(clone.path, copy)


def test_other_versions_are_said_before_anything_is_built(
    built: tuple[Clone, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, recipe = built
    step = recipe.steps[0]
    assert step.environment is not None
    libraries = {**step.environment.libraries, "onnx": "0.1", "no-such-library": "1.0"}
    older = replace(step, environment=replace(step.environment, libraries=libraries))
    fingerprint = {**recipe.bundle.fingerprint, "onnxruntime": "0.2"}
    changed = replace(
        recipe,
        steps=(older, *recipe.steps[1:]),
        bundle=replace(recipe.bundle, fingerprint=fingerprint),
    )
    monkeypatch.setattr(reproducing, "find_recipe", lambda *_: changed)

    with pytest.raises(ConfigError, match="other versions than those that made cpu-unet") as error:
        reproduce_bundle(clone.path, clone.path / BUNDLE)
    assert error.value.expected == "onnx 0.1\nno-such-library 1.0\nfingerprint.onnxruntime 0.2"
    assert "no-such-library none" in error.value.found
    assert "--any-versions" in error.value.fix

    monkeypatch.setattr(reproducing, "rebuilt", stand_in(clone, lambda weights: None))
    assert reproduce_bundle(clone.path, clone.path / BUNDLE, any_versions=True).is_same


def stand_in(clone: Clone, change: Callable[[np.ndarray], None]) -> Callable[..., object]:
    """In place of a build: a bundle with other weights, beside the recorded reference."""

    @contextmanager
    def rebuilt_otherwise(root: Path, recipe: Recipe) -> Iterator[Path]:
        again = root.parent / "again"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(root / recipe.folder, again / recipe.folder)
        forge(again / recipe.folder, change)
        Workspace(again).reference.symlink_to(Workspace(root).reference)
        yield again
        shutil.rmtree(again)

    return rebuilt_otherwise


def nudge(weights: np.ndarray) -> None:
    weights *= 1 + 1e-7


def ruin(weights: np.ndarray) -> None:
    weights *= 2


@pytest.mark.parametrize(
    ("change", "verdict", "same"),
    [(nudge, "within the gates", True), (ruin, "outside of the gates", False)],
)
def test_an_engine_that_comes_out_otherwise_is_judged_by_the_gates(
    change: Callable[[np.ndarray], None],
    verdict: str,
    same: bool,
    built: tuple[Clone, Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clone, recipe = built
    monkeypatch.setattr(reproducing, "find_recipe", lambda *_: recipe)
    monkeypatch.setattr(reproducing, "rebuilt", stand_in(clone, change))
    found = reproduce_bundle(clone.path, clone.path / BUNDLE)
    assert found.is_same is same
    assert set(found.differing) == {DATA, "manifest.json"}
    printed = capsys.readouterr().out
    assert "not bit-identical: 2 of 3 files differ" in printed
    assert f"{verdict}: relative L2 error" in printed


def test_a_commit_that_is_not_what_made_it_is_refused(clone: Clone) -> None:
    recipe = find_recipe(clone.path, clone.path / BUNDLE)
    path = "src/diffusion_engines/onnx/simplify.py"
    (clone.path / path).write_text((clone.path / path).read_text() + "# edited\n")
    clone.commit("other code")
    other = replace(
        recipe, commit=head(clone), params=recipe.params.replace("opset: 18", "opset: 20")
    )
    with (
        pytest.raises(IntegrityError, match="is not what made cpu-unet") as error,
        rebuilt(clone.path, other),
    ):
        pass
    assert error.value.found.splitlines() == [
        "export@unet-fp32: export modified",
        f"simplify@unet-fp32: {path} modified",
    ]


def test_weights_come_from_the_remote_by_their_hashes(
    clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone.run("dvc", "remote", "add", "--local", "-d", "shared", str(tmp_path / "remote"))
    clone.run("dvc", "push")
    shutil.rmtree(clone.path / ".dvc/cache")
    monkeypatch.setattr(rebuilding, "_run", lambda *_: None)
    recipe = find_recipe(clone.path, clone.path / BUNDLE)
    assert all(step.environment for step in recipe.steps)
    with rebuilt(clone.path, recipe) as again:
        for path in ("artifacts/weights", "artifacts/reference"):
            assert not differing_files(clone.path / path, again / path)
        assert not (again / BUNDLE).exists()

    shutil.rmtree(clone.path / ".dvc/cache")
    shutil.rmtree(tmp_path / "remote")
    with (
        pytest.raises(IntegrityError, match="is neither in DVC's cache nor on its remote"),
        rebuilt(clone.path, recipe),
    ):
        pass


@long
def test_an_engine_of_onnx_runtime_is_made_again_bit_by_bit(clone: Clone) -> None:
    before = cached(clone)
    outcome = clone.run("diffusion-engines", "reproduce", str(BUNDLE))
    assert "bit-identical: 2 files" in outcome.output
    assert outcome.ran == {
        "export@unet-fp32",
        "simplify@unet-fp32",
        "build@cpu-unet",
        "wrap@cpu-unet",
    }
    assert cached(clone) == before
    assert clone.run("git", "status", "--porcelain").output == ""
