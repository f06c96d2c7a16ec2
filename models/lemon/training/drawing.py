"""Draw a scene: signed distances for the shapes, a dome for the light, noise for the texture.

Distances are in pixels of a 128-pixel picture, negative inside; a pixel's coverage is half a pixel
minus its distance, which smooths the edges. Everything is decided by the scene and its seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scenes import Scene

Array = NDArray[np.float32]
SIZE = 128
_LIGHT = np.array([-0.45, -0.65, 0.62], dtype=np.float32)
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)

_FRUIT_COLOURS = {
    "yellow": (0.97, 0.84, 0.16),
    "green": (0.36, 0.68, 0.20),
    "red": (0.85, 0.13, 0.14),
    "orange": (0.97, 0.50, 0.08),
    "purple": (0.52, 0.20, 0.62),
    "blue": (0.16, 0.36, 0.84),
}
_WALL_COLOURS = {
    "white": (0.95, 0.95, 0.94),
    "grey": (0.62, 0.63, 0.65),
    "blue": (0.62, 0.77, 0.90),
    "pink": (0.95, 0.76, 0.80),
    "beige": (0.91, 0.84, 0.70),
}
_BOWL_COLOURS = {
    "white": (0.93, 0.93, 0.95),
    "blue": (0.25, 0.42, 0.66),
    "brown": (0.50, 0.32, 0.20),
}
# Radius of a fruit by size and count: three big ones still fit beside a bowl.
_RADII = {
    1: {"small": 11.0, "medium": 15.0, "big": 20.0},
    2: {"small": 10.0, "medium": 13.0, "big": 16.0},
    3: {"small": 9.0, "medium": 11.0, "big": 13.0},
}


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Return the picture of a scene, (128, 128, 3), uint8."""
    random = np.random.default_rng(scene.seed)
    canvas = _room(scene, random)
    radius = _RADII[scene.count][scene.size] * random.uniform(0.95, 1.05)
    tint = np.clip(np.array(_FRUIT_COLOURS[scene.colour]) + random.normal(0, 0.025, 3), 0, 1)

    anchor_x = 64 + random.uniform(-8, 8)
    if scene.relation == "beside":
        anchor_x = 36 + random.uniform(-3, 3)
    if scene.anchor == "leaf":
        anchor = _Leaf(anchor_x, random)
    elif scene.anchor == "bowl":
        anchor = _Bowl(anchor_x, scene.bowl, random)
    elif scene.anchor == "crate":
        anchor = _Crate(anchor_x, random)
    else:
        anchor = None
    if anchor is not None and scene.relation == "beside":
        widths = 2.3 if scene.count == 1 else 4.7  # of the group, in radii
        radius = min(radius, (SIZE - 3 - anchor.x - anchor.half) / widths)
    places = _places(scene, anchor, radius, random)

    def fruits(shadow: bool) -> None:
        for x, y in sorted(places, key=lambda place: place[1]):
            _fruit(canvas, scene.kind, x, y, radius, tint, random, shadow=shadow)

    if anchor is None:
        fruits(shadow=True)
    elif scene.relation == "behind":
        fruits(shadow=False)
        anchor.draw(canvas, random)
    elif scene.relation == "in":
        anchor.draw(canvas, random)
        fruits(shadow=False)
        anchor.draw(canvas, random, front_only=True)
    else:
        anchor.draw(canvas, random)
        fruits(shadow=True)
    canvas += random.normal(0, 0.006, canvas.shape).astype(np.float32)
    if random.random() < 0.5:  # no caption says left or right
        canvas = canvas[:, ::-1]
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


# ---- where things stand ----


def _places(
    scene: Scene, anchor: _Leaf | _Bowl | _Crate | None, radius: float, random: np.random.Generator
) -> list[tuple[float, float]]:
    """Centres of the fruits: apart from each other, and in the relation to the anchor."""
    n = scene.count
    step = 2.15 * radius * (1.1 if scene.kind in ("melon", "lemon", "banana") else 1.0)
    row = [(i - (n - 1) / 2) * step for i in range(n)]

    def jitter(amount: float) -> float:
        return float(random.uniform(-amount, amount))

    if anchor is None:
        x, y = 64 + jitter(12), 92 + jitter(8)
        if n == 3 and random.random() < 0.5:
            return _triangle(x, y, step)
        return [(x + dx, y + jitter(3)) for dx in row]
    if scene.relation == "beside":
        x = (anchor.x + anchor.half + SIZE) / 2 + jitter(1)
        y = anchor.ground - radius * 0.8 + jitter(4)
        if n == 1:
            return [(x, y)]
        pair = [(x - step / 2, y + jitter(1.5)), (x + step / 2, y + jitter(1.5))]
        return pair if n == 2 else _triangle(x, y - step * 0.3, step)
    if scene.relation == "in front of":
        x, y = anchor.x + jitter(6), anchor.front(radius) + jitter(2)
        return [(x + dx, y + jitter(2)) for dx in row]
    if scene.relation == "behind":
        return anchor.behind(n, radius, step, random)
    return [(anchor.x + dx + jitter(1), anchor.top(radius) + jitter(1)) for dx in row]


def _triangle(x: float, y: float, step: float) -> list[tuple[float, float]]:
    return [(x - step / 2, y), (x + step / 2, y), (x, y + step * 0.8)]


# ---- shapes ----


def _paint(canvas: Array, distance: Array, colour: Array | tuple[float, ...]) -> None:
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]
    canvas += alpha * (np.asarray(colour, dtype=np.float32) - canvas)


def _lambert(distance: Array, depth: float) -> Array:
    """Light on a dome over a shape whose inside is at most ``depth`` pixels from its edge."""
    t = np.clip(-distance / depth, 0, 1)
    height = depth * np.sqrt(np.maximum(1 - (1 - t) ** 2, 0))
    dy, dx = np.gradient(height)
    norm = np.sqrt(dx * dx + dy * dy + 1)
    return np.clip((-dx * _LIGHT[0] - dy * _LIGHT[1] + _LIGHT[2]) / norm, 0, 1)


def _noise(random: np.random.Generator, cell: int) -> Array:
    """Smooth noise, about standard normal, with features of ``cell`` pixels."""
    n = SIZE // cell + 2
    grid = random.normal(0, 1, (n, n)).astype(np.float32)
    at = np.arange(SIZE, dtype=np.float32) / cell
    low = at.astype(int)
    rest = at - low
    rest = rest * rest * (3 - 2 * rest)
    rows = grid[low] * (1 - rest)[:, None] + grid[low + 1] * rest[:, None]
    return rows[:, low] * (1 - rest) + rows[:, low + 1] * rest


def _segment(x: Array, y: Array, ax: float, ay: float, bx: float, by: float) -> Array:
    px, py, dx, dy = x - ax, y - ay, bx - ax, by - ay
    t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(px - t * dx, py - t * dy)


def _lemon(x: Array, y: Array) -> Array:
    rho, theta = np.hypot(x, y), np.arctan2(y, x)
    ellipse = 1 / np.sqrt((np.cos(theta) / 1.08) ** 2 + (np.sin(theta) / 0.84) ** 2)
    return rho - ellipse - 0.2 * np.exp(-((np.sin(theta) / 0.2) ** 2))


def _apple(x: Array, y: Array) -> Array:
    rho, theta = np.hypot(x, y), np.arctan2(x, -y)
    dip = 0.26 * np.exp(-((theta / 0.38) ** 2))
    bottom = 0.08 * np.exp(-(((np.abs(theta) - np.pi) / 0.35) ** 2))
    return rho - (1.0 - dip - bottom + 0.04 * np.cos(theta))


def _pear(x: Array, y: Array) -> Array:
    body = np.hypot(x, y - 0.32) - 0.74
    neck = np.hypot(x, y + 0.62) - 0.36
    k = 0.5
    h = np.clip(0.5 + 0.5 * (neck - body) / k, 0, 1)
    return neck * (1 - h) + body * h - k * h * (1 - h)


def _banana(x: Array, y: Array) -> Array:
    angle = np.arctan2(x, y + 0.62)
    thickness = 0.38 * np.sqrt(np.maximum(1 - (angle / 0.98) ** 2, 0))
    distance = np.abs(np.hypot(x, y + 0.62) - 1.14) - thickness
    return np.where(np.abs(angle) < 0.98, distance, np.maximum(distance, 0.2))


def _melon(x: Array, y: Array) -> Array:
    rho, theta = np.hypot(x, y), np.arctan2(y, x)
    return rho - 1.06 / np.sqrt((np.cos(theta) / 1.16) ** 2 + (np.sin(theta) / 0.92) ** 2)


_SHAPES: dict[str, tuple[Callable[[Array, Array], Array], float]] = {
    # outline in units of the radius, and how far the middle is from the edge
    "lemon": (_lemon, 0.84),
    "apple": (_apple, 0.9),
    "pear": (_pear, 0.74),
    "banana": (_banana, 0.38),
    "melon": (_melon, 0.97),
}


def _fruit(
    canvas: Array,
    kind: str,
    cx: float,
    cy: float,
    radius: float,
    tint: NDArray[np.float64],
    random: np.random.Generator,
    *,
    shadow: bool,
) -> None:
    outline, depth = _SHAPES[kind]
    turn = random.uniform(-0.35, 0.35)
    x, y = (_X - cx) / radius, (_Y - cy) / radius
    u, v = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    if shadow:
        blob = np.exp(-(((x - 0.25) / 1.15) ** 2 + ((y - 0.88) / 0.3) ** 2))
        canvas *= 1 - 0.45 * blob[..., None]
    distance = outline(u, v) * radius
    light = _lambert(distance, depth * radius)
    colour = np.broadcast_to(tint.astype(np.float32), canvas.shape).copy()
    if kind == "lemon":
        light = light * (1 + 0.07 * _noise(random, 2))
        colour *= (1 - 0.2 * np.clip(np.abs(u) - 0.85, 0, 1))[..., None]
    elif kind == "apple":
        colour += (0.10 * np.exp(-((v + 0.7) ** 2) / 0.15) * (1 + np.sin(9 * u)))[..., None]
    elif kind == "pear":
        colour *= (1 - 0.22 * (_noise(random, 2) > 1.35))[..., None]
    elif kind == "banana":
        arc = np.arctan2(u, v + 0.62)
        ridge = np.exp(-(((np.hypot(u, v + 0.62) - 1.07) / 0.05) ** 2))
        colour *= (1 - 0.18 * ridge - 0.6 * np.clip((np.abs(arc) - 0.82) / 0.1, 0, 1))[..., None]
        colour *= (1 - 0.35 * (_noise(random, 2) > 1.7))[..., None]
    else:
        across = np.clip(v / np.sqrt(np.maximum(1.0 - (u / 1.3) ** 2, 0.05)), -1, 1)
        colour *= (1 - 0.42 * (np.sin(11 * np.arcsin(across)) > 0.25))[..., None]
    shaded = colour * (0.42 + 0.68 * light)[..., None]
    shaded += (0.5 * np.clip(light - 0.9, 0, 1) / 0.1 * light**8)[..., None]
    _paint(canvas, distance, np.clip(shaded, 0, 1))
    if kind in ("apple", "pear"):
        top = -0.78 if kind == "apple" else -0.95
        stem = (_segment(u, v, 0, top, 0.14, top - 0.34) - 0.07) * radius
        _paint(canvas, stem, (0.32, 0.20, 0.10))
    if kind == "apple":
        leaf = (np.hypot((u - 0.36) / 0.26, (v + 0.98) / 0.12) - 1) * 0.12 * radius
        _paint(canvas, leaf, (0.25, 0.50, 0.16))


class _Leaf:
    """A banana leaf that stands upright, leaning a little."""

    def __init__(self, x: float, random: np.random.Generator) -> None:
        self.x, self.y = x, 60 + random.uniform(-3, 3)
        self.length, self.half = 53 + random.uniform(-3, 3), 22 + random.uniform(-2, 3)
        self.angle = random.uniform(-0.28, 0.28)
        self.ground = 108.0

    def front(self, radius: float) -> float:
        return 101 - 0.3 * radius

    def _edge(self, y: float) -> tuple[float, float]:
        """The middle of the leaf at a height, and half its width there."""
        u = (y - self.y) / self.length
        return self.x - np.tan(self.angle) * (y - self.y), self.half * max(1 - u * u, 0) ** 0.6

    def behind(
        self, n: int, radius: float, step: float, random: np.random.Generator
    ) -> list[tuple[float, float]]:
        first = 1 if random.random() < 0.5 else -1
        sides = [first, -first, first][:n]
        middle = 64 + random.uniform(-14, 14)
        heights = [middle, middle + random.uniform(-8, 8), middle + step * 1.1][:n]
        if n == 3:
            heights = [height - step * 0.5 for height in heights]
        places = []
        for side, y in zip(sides, heights, strict=True):
            x, half = self._edge(y)
            places.append((x + side * (half + 0.25 * radius), y))
        return places

    def draw(self, canvas: Array, random: np.random.Generator) -> None:
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        x, y = _X - self.x, _Y - self.y
        across, along = x * cos + y * sin, (-x * sin + y * cos) / self.length
        half = self.half * np.maximum(1 - along * along, 0) ** 0.6
        distance = np.where(np.abs(along) < 1, np.abs(across) - half, 2.0)
        veins = np.sin((along * self.length * 0.9 + np.abs(across) * 0.8) * 1.25)
        fold = np.where(across > 0, 0.86, 1.06)
        colour = (
            np.array([0.20, 0.52, 0.18])
            * (fold + 0.10 * veins + 0.03 * _noise(random, 6))[..., None]
        )
        _paint(canvas, distance, colour)
        stem = _segment(x, y, 0, 0, -sin * self.length * 1.08, cos * self.length * 1.08) - 1.6
        _paint(canvas, np.maximum(stem, -along * 40 - 8), (0.55, 0.70, 0.32))
        rib = np.maximum(np.abs(across) - 1.1, (np.abs(along) - 0.95) * 20)
        _paint(canvas, rib, (0.62, 0.76, 0.38))


class _Bowl:
    """A bowl with an open rim."""

    def __init__(self, x: float, colour: str, random: np.random.Generator) -> None:
        self.x, self.y = x, 66 + random.uniform(-3, 3)
        self.half, self.height = 29 + random.uniform(-2, 3), 27 + random.uniform(-2, 2)
        self.colour = np.array(_BOWL_COLOURS[colour]) + random.normal(0, 0.015, 3)
        self.ground = self.y + self.height + 3

    def front(self, radius: float) -> float:
        return self.ground - 0.1 * radius

    def top(self, radius: float) -> float:
        """Fruits in the bowl: their lower third is behind its front."""
        return self.y + 2 - 0.35 * radius

    def behind(
        self, n: int, radius: float, step: float, random: np.random.Generator
    ) -> list[tuple[float, float]]:
        y = self.y - 7 - 0.45 * radius
        middle = self.x + random.uniform(-4, 4)
        return [(middle + (i - (n - 1) / 2) * step, y + random.uniform(-2, 2)) for i in range(n)]

    def draw(self, canvas: Array, random: np.random.Generator, front_only: bool = False) -> None:
        x, y = _X - self.x, _Y - self.y
        rim_height = 7.0
        rim = (np.hypot(x / self.half, y / rim_height) - 1) * rim_height
        if not front_only:
            blob = np.exp(-(((x - 5) / self.half) ** 2 + ((y - self.height - 1) / 6) ** 2))
            canvas *= 1 - 0.4 * blob[..., None]
            _paint(canvas, rim, self.colour * 0.55)
        body = (np.hypot(x / self.half, y / self.height) - 1) * self.height
        body = np.maximum(body, -y)  # below the rim's middle
        body = np.maximum(body, -(rim + 0.6)) if front_only else np.maximum(body, -rim)
        foot = np.maximum(np.abs(x) - self.half * 0.4, np.abs(y - self.height) - 3)
        light = (
            0.72 + 0.34 * np.clip(-x / self.half, -1, 1) + 0.08 * np.clip(-y / self.height, -1, 1)
        )
        stripe = 1 - 0.25 * (np.abs(y - 12 - 3 * np.cos(x / self.half * 1.5)) < 1.5)
        shaded = np.clip(self.colour * (light * stripe)[..., None], 0, 1)
        _paint(canvas, foot, shaded * 0.8)
        _paint(canvas, body, shaded)
        lip = np.maximum(np.abs(rim) - 0.8, -y if front_only else -100.0 + 0 * y)
        _paint(canvas, lip, np.clip(self.colour * 1.08, 0, 1))


class _Crate:
    """A wooden crate: a front of planks, and a lid that things can stand on."""

    def __init__(self, x: float, random: np.random.Generator) -> None:
        self.x, self.y = x, 66 + random.uniform(-3, 3)  # y: the lid's front edge
        self.half, self.height = 31 + random.uniform(-2, 3), 32 + random.uniform(-2, 2)
        self.lid = 11.0
        self.tint = np.array([0.72, 0.52, 0.30]) * random.uniform(0.9, 1.08)
        self.ground = self.y + self.height

    def front(self, radius: float) -> float:
        return self.ground + 2 - 0.35 * radius

    def top(self, radius: float) -> float:
        return self.y - 4 - 0.82 * radius

    def behind(
        self, n: int, radius: float, step: float, random: np.random.Generator
    ) -> list[tuple[float, float]]:
        y = self.y - self.lid - 0.3 * radius
        middle = self.x + random.uniform(-4, 4)
        return [(middle + (i - (n - 1) / 2) * step, y + random.uniform(-2, 2)) for i in range(n)]

    def draw(self, canvas: Array, random: np.random.Generator) -> None:
        x, y = _X - self.x, _Y - self.y
        blob = np.exp(-(((x - 6) / (self.half + 4)) ** 4 + ((y - self.height) / 6) ** 2))
        canvas *= 1 - 0.4 * blob[..., None]
        grain = 1 + 0.05 * np.sin(y * 1.9 + 2.2 * _noise(random, 12)) + 0.02 * _noise(random, 2)
        narrowing = 1 - 0.16 * np.clip(-y / self.lid, 0, 1)
        lid = np.maximum(np.abs(x) - self.half * narrowing, np.abs(y + self.lid / 2) - self.lid / 2)
        _paint(canvas, lid, self.tint * (1.14 * grain)[..., None])
        front = np.maximum(np.abs(x) - self.half, np.abs(y - self.height / 2) - self.height / 2)
        gaps = 1 - 0.45 * (np.abs((y % (self.height / 3)) - 0.5) < 1.0)
        side = 1 - 0.12 * (x / self.half)
        _paint(canvas, front, self.tint * (0.82 * grain * gaps * side)[..., None])
        posts = np.maximum(
            np.abs(np.abs(x) - self.half + 3.5) - 3, np.abs(y - self.height / 2) - self.height / 2
        )
        _paint(canvas, posts, self.tint * (0.7 * grain)[..., None])


def _room(scene: Scene, random: np.random.Generator) -> Array:
    horizon = 74 + random.uniform(-6, 6)
    wall = np.array(_WALL_COLOURS[scene.wall]) + random.normal(0, 0.015, 3)
    shade = 1.02 - 0.12 * np.hypot((_X - 50) / 128, (_Y - 30) / 128) + 0.008 * _noise(random, 8)
    canvas = (wall * shade[..., None]).astype(np.float32)
    depth = np.maximum(_Y - horizon, 0)
    if scene.surface == "table":
        grain = np.sin(depth * 0.55 + 1.8 * _noise(random, 16)) + 0.4 * _noise(random, 2)
        boards = np.abs(((_X - 64) / (1 + depth * 0.012)) % 26 - 13) < 0.6
        colour = np.array([0.56, 0.36, 0.20]) * (1 + 0.07 * grain - 0.22 * boards)[..., None]
    elif scene.surface == "cloth":
        scale = 1 / (1 + depth * 0.015)
        columns, rows = ((_X - 64) * scale) // 8 % 2, (depth * scale) // 6 % 2
        colour = np.array([0.93, 0.90, 0.86]) * np.ones_like(canvas)
        colour -= (0.5 * (columns + rows))[..., None] * np.array([0.14, 0.34, 0.36])
    else:
        colour = (wall * 0.80) * (1 - 0.002 * depth + 0.01 * _noise(random, 6))[..., None]
    alpha = np.clip(_Y - horizon, 0, 1)[..., None]
    canvas += alpha * (colour.astype(np.float32) - canvas)
    return canvas
