"""What a build times is kept until it is whole, and goes into the next one."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_engines.backends.inductor.building import tuning
from diffusion_engines.backends.inductor.building.tuning import tuned_convolutions, work_folder

_KEY = torch.ops.aten.convolution.default


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "program.json"
    path.write_text("{}")
    return path


def time_shape(name: str, milliseconds: float) -> None:
    """Do what Inductor does when it has timed a convolution's kernels."""
    cache = importlib.import_module("torch._inductor.codecache").PersistentCache()
    found = cache.get_local_cache()
    shape = found.setdefault("convolution", {}).setdefault(name, {}).setdefault("highest", {})
    shape["aten"] = milliseconds
    cache.update_local_cache(found)


def shapes(path: Path) -> set[str]:
    return set(json.loads(path.read_text())["cache"].get("convolution", {}))


def test_a_build_that_is_interrupted_goes_on_where_it_stopped(program: Path) -> None:
    interrupted = tuned_convolutions(program, None)
    interrupted.__enter__()
    time_shape("first", 0.1)
    assert not interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with tuned_convolutions(program, None) as found:
        assert shapes(found) == {"first"}
        time_shape("second", 0.2)
        assert shapes(found) == {"first", "second"}
    assert not work_folder(program).exists()


def test_a_rebuild_begins_with_what_the_last_one_found(program: Path, tmp_path: Path) -> None:
    kept = tmp_path / "timing.cache"
    with tuned_convolutions(program, None) as found:
        time_shape("first", 0.1)
        kept.write_bytes(found.read_bytes())
    with tuned_convolutions(program, kept) as found:
        assert shapes(found) == {"first"}
    with tuned_convolutions(program, None) as found:
        assert shapes(found) == set()


def test_a_damaged_cache_is_no_reason_to_fail(program: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "timing.cache"
    damaged.write_text("{")
    with tuned_convolutions(program, damaged) as found:
        assert shapes(found) == set()


def test_nothing_of_it_stays_after_a_build(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowerings = importlib.import_module("torch._inductor.lowering").lowerings
    own = lowerings[_KEY]
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with tuned_convolutions(program, None):
        assert lowerings[_KEY] is not own
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(work_folder(program))
    assert lowerings[_KEY] is own
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(("edges", "timed"), [((3, 3), True), ((1, 1), False)])
def test_only_convolutions_proper_are_timed(edges: tuple[int, int], timed: bool) -> None:
    config: Any = importlib.import_module("torch._inductor.config")

    class Weight:
        def get_size(self) -> tuple[int, ...]:
            return (8, 4, *edges)

    seen = tuning._timed(lambda x, weight: config.max_autotune_gemm, None, Weight())
    assert seen is timed
    assert config.max_autotune_gemm is False
