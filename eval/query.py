"""A chat about images that waits for its next answer, and what such a chat may be."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from data_pipeline import limits
from data_pipeline.images import open_image
from data_pipeline.record import Turn
from models.common.errors import InputError

_SPOKEN = {"system": "system text", "user": "question", "assistant": "answer"}


@dataclass(frozen=True)
class ImageFile:
    """An image as its file's content, which is decoded only when its pixels are not known."""

    content: bytes

    @cached_property
    def digest(self) -> bytes:
        """Files with the same one hold the same image."""
        return hashlib.sha256(self.content).digest()

    def open(self) -> Image.Image:
        """Decode it; raises ImageError, as `data_pipeline.images.open_image`."""
        return open_image(self.content)

    @classmethod
    def read(cls, path: Path) -> ImageFile:
        """The image at `path`; raises ImageError where there is none, or a file that is too large."""
        try:
            limits.check_bytes(path.stat().st_size, str(path))
            return cls(path.read_bytes())
        except OSError as error:
            raise limits.ImageError(f"no image at {path} can be read ({error.strerror})") from None


@dataclass(frozen=True)
class Place:
    """Where an image stands: in a turn, before the character `at` of its text (its length is behind the text)."""

    turn: int
    at: int = 0


@dataclass(frozen=True)
class Query:
    """A chat that waits for its next answer, with its images.

    Args:
        images: in the order in which the chat shows them.
        turns: user, assistant, ..., user; a system turn may come first where the model's template has them.
        places: one for each image, in order, in user turns only. Without any, all images come before the first user
            turn's text, as in training.

    Raises:
        InputError: the turns do not alternate, a text is beyond the limits, or an image has no place.
    """

    images: tuple[Image.Image | ImageFile, ...]
    turns: tuple[Turn, ...]
    places: tuple[Place, ...] = ()

    def __post_init__(self) -> None:
        roles = [turn.role for turn in self.turns]
        spoken = roles[1:] if self.has_system else roles
        expected = ["user", "assistant"] * len(spoken)
        if len(spoken) % 2 == 0 or spoken != expected[: len(spoken)]:
            raise InputError(f"a chat alternates user, assistant, ..., user; this one is {', '.join(roles) or 'empty'}")
        for turn in self.turns:
            if problem := limits.text_problem(turn.text):
                raise InputError(f"the {_SPOKEN[turn.role]} {problem}")
        if self.places:
            self._check_places()

    @property
    def has_system(self) -> bool:
        """Whether a system turn comes first."""
        return bool(self.turns) and self.turns[0].role == "system"

    def _check_places(self) -> None:
        if len(self.places) != len(self.images):
            raise InputError(f"{len(self.images)} images have {len(self.places)} places: give each one")
        for place in self.places:
            if not 0 <= place.turn < len(self.turns) or self.turns[place.turn].role != "user":
                raise InputError(f"an image is placed in turn {place.turn}, which is none of the user's")
            if not 0 <= place.at <= len(self.turns[place.turn].text):
                raise InputError(f"an image is placed at character {place.at} of a shorter text")
        if list(self.places) != sorted(self.places, key=lambda place: (place.turn, place.at)):
            raise InputError("the places of the images are out of order: images come in the order of the chat")
