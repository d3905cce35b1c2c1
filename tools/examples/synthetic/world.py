"""The synthetic world: scenes, their random generation, and rendering them as images.

Owns the facts (`Scene`, `Thing`), their seeded draw and the pixels. Does not own texts (questions.py) or files
(write.py).

      +-------------+-------------+
      |  top left   |  top right  |   one or two things, each at a place of its own, with a shape, a colour and a
      |      O      |             |   size; its exact position, shade and extent are random, so no
      |-------------+-------------|   two images of one scene are the same.
      | bottom left | bottom right|
      |             |      +      |
      +-------------+-------------+
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 48
"""Width and height of an image, in pixels."""
PLACES = ("top left", "top right", "bottom left", "bottom right")
CENTRES = ((12, 12), (36, 12), (12, 36), (36, 36))
"""The centre of place i, in pixels: (x from the left, y from the top)."""
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (36, 158, 66),
    "blue": (38, 84, 214),
    "yellow": (238, 204, 32),
    "purple": (146, 48, 180),
    "orange": (244, 128, 24),
}
COUNT_WEIGHTS = {1: 0.4, 2: 0.6}
"""Weights of the number of things in a scene. Single things teach words, pairs teach to tell things apart."""

_SUPERSAMPLE = 4
_RADIUS = {"small": (4.8, 6.2), "large": (9.0, 10.5)}
_SHADE = 14
_JITTER = 1.5
_POLYGONS = {
    "square": ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": ((0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)),
    "cross": (
        (-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36), (1.0, 0.36), (0.36, 0.36),
        (0.36, 1.0), (-0.36, 1.0), (-0.36, 0.36), (-1.0, 0.36), (-1.0, -0.36), (-0.36, -0.36),
    ),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Thing:
    """One coloured shape: `place` indexes PLACES, the words are those of SIZES, COLOURS and SHAPES."""

    place: int
    size: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        """Its colour and shape, "red circle"; nothing else in its scene has either."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What an image shows: things in the order of PLACES, at most one to a place, no two of one colour or one shape.

    Equality is equality of content: two scenes that compare equal may still be drawn differently (`render`).
    """

    things: tuple[Thing, ...]

    def at(self, place: int) -> Thing | None:
        """The thing at a place, or None."""
        return next((thing for thing in self.things if thing.place == place), None)


def draw_scene(rng: random.Random) -> Scene:
    """A random scene."""
    count = rng.choices(list(COUNT_WEIGHTS), weights=list(COUNT_WEIGHTS.values()))[0]
    places = sorted(rng.sample(range(len(PLACES)), count))
    colours, shapes = rng.sample(list(COLOURS), count), rng.sample(SHAPES, count)
    chosen = zip(places, colours, shapes, strict=True)
    return Scene(tuple(Thing(place, rng.choice(SIZES), colour, shape) for place, colour, shape in chosen))


def draw_scenes(count: int, rng: random.Random, without: frozenset[Scene] = frozenset()) -> Iterator[Scene]:
    """`count` random scenes, none with the content of one in `without`."""
    while count:
        scene = draw_scene(rng)
        if scene not in without:
            count -= 1
            yield scene


def render(scene: Scene, rng: random.Random, scale: int = 1) -> Image.Image:
    """An image of the scene, `scale` (1, 2 or 4) times SIDE wide and high, RGB; `rng` draws the open details."""
    side = SIDE * _SUPERSAMPLE
    grey = rng.randint(205, 245)
    image = Image.new("RGB", (side, side), (grey, grey, grey))
    pencil = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(pencil, thing, rng)
    return image.reduce(_SUPERSAMPLE // scale)


def _draw_thing(pencil: ImageDraw.ImageDraw, thing: Thing, rng: random.Random) -> None:
    radius = rng.uniform(*_RADIUS[thing.size])
    x, y = (centre + rng.uniform(-_JITTER, _JITTER) for centre in CENTRES[thing.place])
    colour = tuple(max(0, min(255, value + rng.randint(-_SHADE, _SHADE))) for value in COLOURS[thing.colour])
    if thing.shape == "circle":
        box = [(x - radius, y - radius), (x + radius, y + radius)]
        pencil.ellipse([(a * _SUPERSAMPLE, b * _SUPERSAMPLE) for a, b in box], fill=colour)
    else:
        corners = [(x + radius * dx, y + radius * dy) for dx, dy in _POLYGONS[thing.shape]]
        pencil.polygon([(a * _SUPERSAMPLE, b * _SUPERSAMPLE) for a, b in corners], fill=colour)
