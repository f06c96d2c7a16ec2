from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from diffusion_engines.report.images import amplified_difference, write_trajectory


def save(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("edge", "width"), [(16, 256), (300, 300), (1024, 512)])
def test_trajectory_keeps_every_frame_at_a_size_to_look_at(tmp_path, edge, width) -> None:
    # Equal frames, which Pillow would merge if nothing told them apart.
    frame = save(tmp_path / "frame.png", np.full((edge, edge, 3), 90))
    write_trajectory(tmp_path / "a.gif", [frame] * 4, [0, 2, 4, 6])
    with Image.open(tmp_path / "a.gif") as gif:
        assert isinstance(gif, GifImageFile)
        assert gif.n_frames == 4
        assert gif.width == width
        assert gif.info["loop"] == 0
        durations = []
        for index in range(4):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert durations[-1] > 3 * max(durations[:-1])


@pytest.mark.parametrize(("difference", "factor"), [(0, 1), (1, 128), (3, 64), (100, 2), (255, 1)])
def test_differences_are_amplified_without_overflow(tmp_path, difference, factor) -> None:
    black = np.zeros((4, 4, 3))
    other = black.copy()
    other[0, 0, 0] = difference
    a, b = save(tmp_path / "a.png", other), save(tmp_path / "b.png", black)
    for one, two in ((a, b), (b, a)):
        found = amplified_difference(one, two)
        assert (found.largest, found.factor) == (difference, factor)
        with Image.open(io.BytesIO(found.png)) as image:
            assert int(np.asarray(image).max()) == difference * factor
