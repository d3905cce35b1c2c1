"""What can be said and asked about a scene: captions, and questions with their answers.

Owns every word of the small world. Each kind of question is one function from a scene to a question, or to None where
the scene does not allow it; answers are balanced, so that a guess without the picture gets little.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.toy.world import COLOURS, PLACES, SHAPES, Scene, Thing

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
    """The colour of a thing, known by its shape where only one has that shape, else by its place."""
    thing = rng.choice(scene.things)
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    which = thing.shape if alone else f"{thing.shape} at the {PLACES[thing.place]}"
    return Question("colour", f"What colour is the {which}?", thing.colour)


def ask_shape(scene: Scene, rng: random.Random) -> Question:
    """The shape of a thing, known by its colour where only one has that colour, else by its place."""
    thing = rng.choice(scene.things)
    alone = sum(other.colour == thing.colour for other in scene.things) == 1
    which = f"{thing.colour} thing" if alone else f"{thing.colour} thing at the {PLACES[thing.place]}"
    return Question("shape", f"What shape is the {which}?", thing.shape)


def ask_where(scene: Scene, rng: random.Random) -> Question:
    """The place of a thing."""
    thing = rng.choice(scene.things)
    return Question("where", f"Where is the {thing.name}?", PLACES[thing.place])


def ask_size(scene: Scene, rng: random.Random) -> Question:
    """Whether a thing is small or large."""
    thing = rng.choice(scene.things)
    return Question("size", f"What size is the {thing.name}?", thing.size)


def ask_exists(scene: Scene, rng: random.Random) -> Question:
    """Whether there is such a thing; half of the time there is not, though its colour or shape is."""
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        return Question("exists", f"Is there a {thing.name}?", "yes")
    present = {other.name for other in scene.things}
    near = [f"{colour} {thing.shape}" for colour in COLOURS] + [f"{thing.colour} {shape}" for shape in SHAPES]
    absent = [name for name in near if name not in present]
    return Question("exists", f"Is there a {rng.choice(absent)}?", "no")


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """Whether one thing lies left of, or above, another; None where there is but one thing."""
    if len(scene.things) < 2:
        return None
    first, second = rng.sample(scene.things, 2)
    (row, column), (other_row, other_column) = divmod(first.place, 2), divmod(second.place, 2)
    words = [("left of", column - other_column)] * (column != other_column)
    words += [("above", row - other_row)] * (row != other_row)
    word, difference = rng.choice(words)
    return Question("relation", f"Is the {first.name} {word} the {second.name}?", "yes" if difference < 0 else "no")


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
