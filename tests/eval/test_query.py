"""Chats alternate, their texts are within the limits, and every image has a place."""

from __future__ import annotations

import pytest

from data_pipeline.record import Turn
from eval.query import Place, Query
from models.common.errors import InputError
from tests.support.bundles import image

CHAT = (Turn("user", "Compare the one"), Turn("assistant", "A circle."), Turn("user", "with and say more"))


@pytest.mark.parametrize("roles", [[], ["assistant"], ["user", "assistant"], ["user", "user", "user"], ["system"]])
def test_a_chat_alternates_and_ends_with_the_user(roles: list[str]) -> None:
    with pytest.raises(InputError, match="a chat alternates user, assistant"):
        Query((), tuple(Turn(role, "x") for role in roles))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["half \ud83d", "long " * 200_000], ids=["half", "long"])
def test_a_text_that_training_refuses_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"the question (holds half|has 1000000 characters)"):
        Query((), (Turn("user", text),))


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ((Place(0),), "2 images have 1 places"),
        ((Place(1), Place(2)), "turn 1, which is none of the user's"),
        ((Place(0), Place(7)), "turn 7"),
        ((Place(0), Place(0, 99)), "character 99"),
        ((Place(2), Place(0)), "out of order"),
    ],
)
def test_an_image_without_a_place_is_refused(places: tuple[Place, ...], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Query((image(), image()), CHAT, places)
