"""What can be said and asked about a scene: captions, and questions with their answers.

Owns every word of the small world. Each kind of question is one function from a scene to a question, or to None where
the scene does not allow it; answers are balanced, so that a guess without the picture gets little.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.toy.world import CENTRES, COLOURS, PLACES, SHAPES, Scene, Thing

NOTHING = "nothing"
CAPTION_REQUEST = "Describe the picture."
_NUMBERS = {1: "one thing", 2: "two things", 3: "three things", 4: "four things"}


@dataclass(frozen=True)
class Question:
    """A question, its only right answer, and its kind (a key of KINDS)."""

    kind: str
    text: str
    answer: str


def phrase(thing: Thing) -> str:
    """A thing in full: "a large red circle"."""
    return f"a {thing.size} {thing.colour} {thing.shape}"


def captions(scene: Scene) -> list[str]:
    """Three true descriptions of the whole scene in different words; the first is the one that is taught."""
    placed = [f"{phrase(thing)} at the {PLACES[thing.place]}" for thing in scene.things]
    reverse = [f"at the {PLACES[thing.place]} {phrase(thing)}" for thing in scene.things]
    return [
        " and ".join(placed) + ".",
        f"{_NUMBERS[len(placed)]}: {', '.join(placed)}.",
        "there is " + " and ".join(reverse) + ".",
    ]


def describe(scene: Scene, rng: random.Random) -> str:
    """The whole scene in words, phrased and ordered by lot: what stands in a picture's stead in text."""
    things = rng.sample(scene.things, len(scene.things))
    style = rng.randrange(3)
    if style == 0:
        return ", ".join(f"{PLACES[thing.place]} {thing.size} {thing.name}" for thing in things)
    if style == 1:
        return " and ".join(f"{phrase(thing)} at the {PLACES[thing.place]}" for thing in things)
    return ", ".join(f"{thing.name} {thing.size} {PLACES[thing.place]}" for thing in things)


def ask_at(scene: Scene, rng: random.Random, place: int | None = None) -> Question:
    """What lies at a place, which may be empty."""
    place = rng.randrange(len(PLACES)) if place is None else place
    thing = scene.at(place)
    return Question("at", f"What is at the {PLACES[place]}?", phrase(thing) if thing else NOTHING)


def ask_count(scene: Scene, rng: random.Random) -> Question:
    """How many things there are."""
    del rng  # one way to ask
    return Question("count", "How many things are there?", str(len(scene.things)))


def ask_colour(scene: Scene, rng: random.Random) -> Question:
    """The colour of a thing known by its shape."""
    thing = rng.choice(scene.things)
    return Question("colour", f"What colour is the {thing.shape}?", thing.colour)


def ask_shape(scene: Scene, rng: random.Random) -> Question:
    """The shape of a thing known by its colour."""
    thing = rng.choice(scene.things)
    return Question("shape", f"What shape is the {thing.colour} thing?", thing.shape)


def ask_where(scene: Scene, rng: random.Random) -> Question:
    """The place of a thing."""
    thing = rng.choice(scene.things)
    return Question("where", f"Where is the {thing.name}?", PLACES[thing.place])


def ask_size(scene: Scene, rng: random.Random) -> Question:
    """Whether a thing is small or large."""
    thing = rng.choice(scene.things)
    return Question("size", f"What size is the {thing.name}?", thing.size)


def ask_exists(scene: Scene, rng: random.Random) -> Question:
    """Whether there is a thing of some shape or some colour; half of the time there is."""
    by_shape = rng.random() < 0.5
    values = list(SHAPES if by_shape else COLOURS)
    present = [thing.shape if by_shape else thing.colour for thing in scene.things]
    there = rng.random() < 0.5
    value = rng.choice(present if there else [value for value in values if value not in present])
    return Question("exists", f"Is there a {value}{'' if by_shape else ' thing'}?", "yes" if there else "no")


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """On which side of another a thing lies, across or up and down; None where there is but one thing."""
    if len(scene.things) < 2:
        return None
    first, second = rng.sample(scene.things, 2)
    (x, y), (other_x, other_y) = CENTRES[first.place], CENTRES[second.place]
    across, along = ("left of", "right of", x - other_x), ("above", "below", y - other_y)
    near, far, difference = rng.choice([side for side in (across, along) if side[-1]])
    text = f"Is the {first.name} {near} or {far} the {second.name}?"
    return Question("relation", text, near if difference < 0 else far)


KINDS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "at": ask_at,
    "count": ask_count,
    "colour": ask_colour,
    "shape": ask_shape,
    "where": ask_where,
    "size": ask_size,
    "exists": ask_exists,
    "relation": ask_relation,
}
"""Every kind of question, each equally often among those that are held out."""


def ask_all(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of each kind that the scene allows, in an order by lot."""
    asked = [question for ask in KINDS.values() if (question := ask(scene, rng))]
    rng.shuffle(asked)
    return asked


def ask_places(scene: Scene, rng: random.Random) -> list[Question]:
    """What lies at each place, in an order by lot."""
    return [ask_at(scene, rng, place) for place in rng.sample(range(len(PLACES)), len(PLACES))]
