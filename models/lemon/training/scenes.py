"""Scenes in the spirit of "A big banana leaf with lemons in front of it", and captions for them.

A scene is what a drawing shows: one to three fruits of a kind and colour, perhaps a leaf, a bowl or
a crate that they stand in a relation to, a surface and a wall. Some combinations are held out: they
are in no training caption, so that a model that draws them has understood the words.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from random import Random

KINDS = ("lemon", "apple", "pear", "banana", "melon")
COLOURS = ("yellow", "green", "red", "orange", "purple", "blue")
ANCHORS = ("none", "leaf", "bowl", "crate")
RELATIONS = ("none", "in front of", "behind", "beside", "on", "in")
SIZES = ("small", "medium", "big")
SURFACES = ("plain", "table", "cloth")
WALLS = ("white", "grey", "blue", "pink", "beige")
BOWLS = ("white", "blue", "brown")

# The colour that a fruit has when the caption names none.
NATURAL = {"lemon": "yellow", "apple": "red", "pear": "green", "banana": "yellow", "melon": "green"}
POSSIBLE = {
    "none": ("none",),
    "leaf": ("in front of", "behind", "beside"),
    "bowl": ("in front of", "behind", "beside", "in"),
    "crate": ("in front of", "behind", "beside", "on"),
}
_NUMBERS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
_RELATION_WORDS = {
    "in front of": ("in front of",),
    "behind": ("behind",),
    "beside": ("beside", "next to"),
    "on": ("on", "on top of"),
    "in": ("in", "inside"),
}
HELD_OUT_SHARE = 20  # one combination in so many


@dataclass(frozen=True)
class Scene:
    """What a drawing shows. ``seed`` decides positions, jitter of colours and texture."""

    kind: str
    colour: str
    count: int
    anchor: str
    relation: str
    size: str
    surface: str
    wall: str
    bowl: str
    seed: int

    @property
    def held_out(self) -> bool:
        """Whether no training caption may have this combination of attributes."""
        combination = (self.kind, self.colour, self.count, self.anchor, self.relation)
        return zlib.crc32(repr(combination).encode()) % HELD_OUT_SHARE == 0


def random_scene(random: Random, *, held_out: bool) -> Scene:
    """Draw a scene of the training set, or of the held-out combinations."""
    while True:
        kind = random.choice(KINDS)
        # Half of the fruits have their natural colour, as half of the captions leave it out.
        colour = NATURAL[kind] if random.random() < 0.4 else random.choice(COLOURS)
        anchor = random.choices(ANCHORS, (1, 2, 2, 2))[0]
        scene = Scene(
            kind=kind,
            colour=colour,
            count=random.randint(1, 3),
            anchor=anchor,
            relation=random.choice(POSSIBLE[anchor]),
            size=random.choice(SIZES),
            surface=random.choice(SURFACES),
            wall=random.choice(WALLS),
            bowl=random.choice(BOWLS),
            seed=random.getrandbits(32),
        )
        if scene.held_out == held_out:
            return scene


def caption_from_scene(scene: Scene, random: Random, *, exact: bool = False) -> str:
    """Describe a scene in varied English.

    Args:
        scene: what to describe.
        random: chooses among the ways to say it.
        exact: name colour and number always, so that a drawing can be marked against the caption.
    """
    subject = _subject(scene, random, exact)
    if scene.anchor == "none":
        text = random.choice(("{s}", "{s}", "a picture of {s}", "{there} {s}"))
    else:
        text = random.choice(
            (
                "{s} {r} {a}",
                "{s} {r} {a}",
                "{a} with {s} {r} it",
                "{there} {s} {r} {a}",
                "a picture of {s} {r} {a}",
                "{a} and {s} {r} it",
            )
        )
    text = text.format(
        s=subject,
        a=_anchor(scene, random),
        r=random.choice(_RELATION_WORDS.get(scene.relation, ("",))),
        there="there is" if scene.count == 1 else "there are",
    )
    if scene.surface != "plain" and random.random() < 0.6:
        text += {"table": " on a wooden table", "cloth": " on a checked cloth"}[scene.surface]
    if random.random() < 0.4:
        text += random.choice((", {} background", ", {} wall", " and a {} wall")).format(scene.wall)
    if random.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text


def _subject(scene: Scene, random: Random, exact: bool) -> str:
    words = []
    if exact or scene.count == 1 or random.random() < 0.8:
        words.append(random.choice(_NUMBERS[scene.count]))
    if scene.size != "medium" and random.random() < 0.6:
        words.append(scene.size)
    if exact or scene.colour != NATURAL[scene.kind] or random.random() < 0.5:
        words.append(scene.colour)
    words.append(scene.kind if scene.count == 1 else f"{scene.kind}s")
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join(words)


def _anchor(scene: Scene, random: Random) -> str:
    if scene.anchor == "leaf":
        return random.choice(("a big banana leaf", "a banana leaf", "a big leaf"))
    if scene.anchor == "bowl":
        return f"a {scene.bowl} bowl" if random.random() < 0.4 else "a bowl"
    return random.choice(("a wooden crate", "a crate"))


def labels_from_scene(scene: Scene) -> dict[str, int]:
    """Return the class index of each attribute that drawings are marked on."""
    values = asdict(scene)
    return {
        "object": KINDS.index(values["kind"]),
        "colour": COLOURS.index(values["colour"]),
        "count": values["count"] - 1,
        "anchor": ANCHORS.index(values["anchor"]),
        "relation": RELATIONS.index(values["relation"]),
    }


ATTRIBUTES = {
    "object": KINDS,
    "colour": COLOURS,
    "count": ("1", "2", "3"),
    "anchor": ANCHORS,
    "relation": RELATIONS,
}
