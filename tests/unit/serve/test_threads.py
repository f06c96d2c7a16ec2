"""A pipeline under load: threads that share it, the cores that it takes, and processes."""

from __future__ import annotations

import functools
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_engines import load_component, load_pipeline, manifests
from diffusion_engines.backends import backend
from diffusion_engines.errors import ConfigError, DiffusionEnginesError

PROMPT = "A big banana leaf with lemons in front of it"


@pytest.fixture(scope="module")
def served(tiny_bundles: Path) -> Any:
    pipeline: Any = load_pipeline(tiny_bundles)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, steps: int = 2, seed: int = 7) -> torch.Tensor:
    images: torch.Tensor = pipeline(
        PROMPT,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images


def test_threads_on_one_pipeline_and_on_two_paint_what_each_would_alone(
    served: Any, tiny_bundles: Path
) -> None:
    other: Any = load_pipeline(tiny_bundles)
    other.set_progress_bar_config(disable=True)
    # Other steps and seeds in each: neither may find those of another.
    settings = [(2, 1), (5, 2), (3, 3), (2, 4)]
    expected = [paint(served, *value) for value in settings]
    with ThreadPoolExecutor(len(settings)) as pool:
        pipelines = [served, served, served, other]
        found = [
            *pool.map(lambda both: paint(both[0], *both[1]), zip(pipelines, settings, strict=True))
        ]
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], found[3])


def test_an_interrupted_pipeline_paints_as_before(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, calls = paint(served), []
    own = type(served.unet).noise

    def fails(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(served.unet), "noise", fails)
        with pytest.raises(KeyboardInterrupt):
            paint(served)
    assert torch.equal(paint(served), expected)


def in_a_child(call: Callable[[], object]) -> str:
    """Return what a call says in a forked process; one that hangs says nothing."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads, from 3.12
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            call()
            text = "it ran"
        except DiffusionEnginesError as error:
            text = str(error)
        except BaseException as error:  # nothing may leave: pytest would go on in the child
            text = repr(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(child, 0)
    return text


def test_after_a_fork_an_engine_is_refused_instead_of_waiting_forever(
    served: Any, tiny_bundles: Path
) -> None:
    paint(served)
    unet = load_component(tiny_bundles / "unet")
    inputs = torch.zeros(2, 4, 16, 16), torch.zeros(1), torch.zeros(2, 77, 32)
    unet(*inputs)
    for call in (lambda: paint(served), lambda: unet(*inputs)):
        said = in_a_child(call)
        assert "cpu-unet was loaded before this process was forked" in said
        assert "post_fork" in said


@pytest.fixture
def one_core() -> Iterator[int]:
    """The only core on which this thread may run."""
    allowed = os.sched_getaffinity(0)
    core = max(allowed)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, allowed)


@pytest.fixture
def _threads_of_pytorch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads_of(load: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Return what is loaded, and the threads that came with it."""
    tasks = Path("/proc/self/task")
    before = {path.name for path in tasks.iterdir()}
    loaded = load()
    return loaded, [int(path.name) for path in tasks.iterdir() if path.name not in before]


def test_an_engine_stays_on_the_cores_that_the_process_may_use(
    tiny_bundles: Path, one_core: int
) -> None:
    folder = tiny_bundles / "unet"
    manifest = manifests.read(folder, manifests.Bundle)

    def load(threads: int | None) -> Any:
        return backend("onnxruntime").load(folder, manifest, "cpu", threads=threads)

    for count, expected in ((None, 0), (1, 0), (3, 2)):  # besides the caller's own
        unet, threads = threads_of(functools.partial(load, count))
        assert len(threads) == expected
        assert all(os.sched_getaffinity(thread) == {one_core} for thread in threads)
        unet(torch.zeros(2, 4, 16, 16), torch.zeros(1), torch.zeros(2, 77, 32))


@pytest.mark.usefixtures("_threads_of_pytorch")
def test_threads_are_pytorchs_too(tiny_bundles: Path) -> None:
    for count in (3, 2):
        _, threads = threads_of(
            functools.partial(load_component, tiny_bundles / "unet", threads=count)
        )
        assert len(threads) >= count - 1
        assert torch.get_num_threads() == count


def test_no_threads_are_refused(tiny_bundles: Path) -> None:
    with pytest.raises(ConfigError, match="threads: there cannot be so few"):
        load_pipeline(tiny_bundles, threads=0)
