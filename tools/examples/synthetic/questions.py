"""Captions of a scene, and questions with their answers.

Owns all text of the synthetic world. Each kind of question is one function from a scene to a question, or to None where
the scene does not allow it; answers are balanced, so that guessing without the image scores low.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.examples.synthetic.world import CENTRES, PLACES, Scene, Thing

NOTHING = "nothing"
CAPTION_REQUEST = "Describe the picture."
_AT_A_THING = 0.75
"""Share of the questions about a place that certainly has a thing: `nothing` must not be the best guess."""
_NUMBERS = {1: "one thing", 2: "two things"}
_SIDES = {
    "further left": (0, 1),
    "further right": (0, -1),
    "higher": (1, 1),
    "lower": (1, -1),
}
"""Which thing is ...: the axis that is compared, and the sign by which the smaller coordinate wins."""


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
    """Three true descriptions of the whole scene in different words; the first is the one that is trained on."""
    placed = [f"{phrase(thing)} at the {PLACES[thing.place]}" for thing in scene.things]
    reverse = [f"at the {PLACES[thing.place]} {phrase(thing)}" for thing in scene.things]
    return [
        " and ".join(placed) + ".",
        f"{_NUMBERS[len(placed)]}: {', '.join(placed)}.",
        "there is " + " and ".join(reverse) + ".",
    ]


def ask_at(scene: Scene, rng: random.Random) -> Question:
    """What lies at a place, which may be empty."""
    place = rng.choice(scene.things).place if rng.random() < _AT_A_THING else rng.randrange(len(PLACES))
    thing = scene.at(place)
    return Question("at", f"What is at the {PLACES[place]}?", thing.name if thing else NOTHING)


def ask_count(scene: Scene, rng: random.Random) -> Question:
    """How many things there are."""
    del rng  # one way to ask
    return Question("count", "How many things are there?", str(len(scene.things)))


def ask_colour(scene: Scene, rng: random.Random) -> Question:
    """The colour of the thing at a place."""
    thing = rng.choice(scene.things)
    return Question("colour", f"What colour is the thing at the {PLACES[thing.place]}?", thing.colour)


def ask_shape(scene: Scene, rng: random.Random) -> Question:
    """The shape of a thing known by its colour."""
    thing = rng.choice(scene.things)
    return Question("shape", f"What shape is the {thing.colour} thing?", thing.shape)


def ask_where(scene: Scene, rng: random.Random) -> Question:
    """The place of a thing known by its colour."""
    thing = rng.choice(scene.things)
    return Question("where", f"Where is the {thing.colour} thing?", PLACES[thing.place])


def ask_size(scene: Scene, rng: random.Random) -> Question:
    """Whether a thing known by its colour is small or large."""
    thing = rng.choice(scene.things)
    return Question("size", f"What size is the {thing.colour} thing?", thing.size)


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """Which of two things lies further to one side; None where there is but one thing."""
    if len(scene.things) < 2:
        return None
    first, second = scene.things
    here, there = CENTRES[first.place], CENTRES[second.place]
    side = rng.choice([side for side, (axis, _) in _SIDES.items() if here[axis] != there[axis]])
    axis, sign = _SIDES[side]
    nearer = first if sign * here[axis] < sign * there[axis] else second
    return Question("relation", f"Which thing is {side}?", nearer.name)


KINDS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "at": ask_at,
    "count": ask_count,
    "colour": ask_colour,
    "shape": ask_shape,
    "where": ask_where,
    "size": ask_size,
    "relation": ask_relation,
}
"""Every kind of question, each equally often among those that are held out."""


def ask_some(scene: Scene, rng: random.Random, num: int) -> list[Question]:
    """`num` questions of different kinds, each kind that the scene allows equally likely."""
    asked = [question for ask in KINDS.values() if (question := ask(scene, rng))]
    return rng.sample(asked, num)
