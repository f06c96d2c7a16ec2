"""The denoising animation, and what makes a difference between two pictures visible."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALLEST, _LARGEST = 256, 512  # edge of an animation, in pixels
_FRAME_MS, _LAST_FRAME_MS = 280, 2400
_BAR = 26  # pixels below the picture
_BACKGROUND, _TRACK, _DONE, _TEXT = (24, 26, 30), (58, 62, 70), (122, 162, 214), (222, 225, 230)


@dataclass(frozen=True)
class AmplifiedDifference:
    """A picture of |a − b| times ``factor``; ``largest`` is the largest |a − b|, of 255."""

    png: bytes
    factor: int
    largest: int


def amplified_difference(image: Path, reference: Path) -> AmplifiedDifference:
    """Compare two 8-bit pictures of one size, amplified so that the largest difference shows.

    The factor is a power of two, at most 128: a difference of one level must not look like noise
    of full strength.
    """
    a, b = (np.asarray(_rgb(path), dtype=np.int16) for path in (image, reference))
    difference = np.abs(a - b)
    largest = int(difference.max())
    factor = 1
    while largest and factor < 128 and largest * factor * 2 <= 255:
        factor *= 2
    picture = Image.fromarray((difference * factor).astype(np.uint8))
    return AmplifiedDifference(png_bytes(picture), factor, largest)


def write_trajectory(path: Path, frames: Sequence[Path], steps: Sequence[int]) -> None:
    """Write intermediate images as an endless GIF that rests on the last one."""
    pictures = [
        _labelled(_resized(_rgb(frame)), step, steps[-1])
        for frame, step in zip(frames, steps, strict=True)
    ]
    # A palette of its own for each frame: noise and picture have few colours in common.
    paletted = [picture.quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
    durations = [_FRAME_MS] * (len(paletted) - 1) + [_LAST_FRAME_MS]
    paletted[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=paletted[1:],
        duration=durations,
        loop=0,
        optimize=False,
    )


def last_frame(frames: Sequence[Path], steps: Sequence[int]) -> bytes:
    """The end of the animation as a still PNG, for print and for who wants no motion."""
    return png_bytes(_labelled(_resized(_rgb(frames[-1])), steps[-1], steps[-1]))


def still(image: Path) -> bytes:
    """An image as a PNG of the size that animations have."""
    return png_bytes(_resized(_rgb(image)))


def png_bytes(picture: Image.Image) -> bytes:
    """Encode a picture without metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _resized(image: Image.Image) -> Image.Image:
    short, long = min(image.size), max(image.size)
    scale = -(-_SMALLEST // short) if short < _SMALLEST else min(1.0, _LARGEST / long)
    if scale == 1:
        return image
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _labelled(image: Image.Image, step: int, steps: int) -> Image.Image:
    """Add a line with the step and a bar below the picture, so that no two frames are equal.

    Pillow merges equal frames, and the animation would lose its rhythm.
    """
    width, height = image.size
    canvas = Image.new("RGB", (width, height + _BAR), _BACKGROUND)
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, height, width - 1, height + 2), fill=_TRACK)
    if step:
        end = round((width - 1) * step / max(steps, 1))
        draw.rectangle((0, height, end, height + 2), fill=_DONE)
    label = "noise" if step == 0 else f"step {step} of {steps}"
    draw.text((8, height + 7), label, font=_font(), fill=_TEXT)
    return canvas


def _font() -> ImageFont.FreeTypeFont:
    # Matplotlib ships this one, so the letters are the same on every machine.
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", 12)
