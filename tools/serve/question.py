"""What is asked, whichever way it came: turns and pictures, before any picture is decoded."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from data_pipeline.limits import MAX_BYTES, ImageError
from data_pipeline.record import Turn
from eval.prompts import PromptTooLongError
from eval.query import Place
from models.common.errors import InputError
from tools.serve.errors import ApiError, invalid
from tools.serve.taken_out import NOTHING_TAKEN, Taken
from tools.serve.wire import ImagePart, Message, TextPart, VideoPart

_BASE64_CHARACTERS = MAX_BYTES * 4 // 3 + 4
_HEAD_CHARACTERS = 2000
"""Within which a URL says what it is."""
_PIECE = 1 << 20
"""Characters of base64 that are read at a time: the interpreter is nobody else's meanwhile, 0.4 s for 67 MB at once."""


@dataclass(frozen=True)
class Question:
    """A chat whose pictures are files still, or addresses."""

    turns: tuple[Turn, ...]
    pictures: tuple[bytes | str, ...] = ()
    places: tuple[Place, ...] = ()
    param: str = "messages"
    """The field that is at fault where the chat is."""
    picture_param: str = "image_url"
    """The field that is at fault where a picture is."""


def of_messages(messages: Sequence[Message], taken: Taken = NOTHING_TAKEN) -> Question:
    """The question that a list of OpenAI's messages asks; every picture keeps its place.

    Args:
        taken: the URLs in whose places the messages have names.

    Raises:
        ApiError: a turn without text, a picture outside of the user's turns, one that is not base64, or a video.
    """
    turns: list[Turn] = []
    pictures: list[bytes | str] = []
    places: list[Place] = []
    for number, message in enumerate(messages):
        text = ""
        for part in _parts(message):
            if isinstance(part, TextPart):
                text += part.text
                continue
            if isinstance(part, VideoPart):
                raise invalid(
                    f"messages.{number}: videos are not read; send frames as image_url", "messages", part.type
                )
            if message.role != "user":
                raise invalid(f"messages.{number}: only the user's messages hold pictures", "messages")
            places.append(Place(number, len(text)))
            pictures.append(read_url(taken.get(part.image_url.url, part.image_url.url)))
        if not text.strip() and message.role != "assistant":
            raise invalid(f"messages.{number}: there is no text in it, and the model answers to text", "messages")
        turns.append(Turn("system" if message.role == "developer" else message.role, text))
    return Question(tuple(turns), tuple(pictures), tuple(places))


def _parts(message: Message) -> Sequence[TextPart | ImagePart | VideoPart]:
    if message.content is None:
        return ()
    if isinstance(message.content, str):
        return (TextPart(type="text", text=message.content),)
    return message.content


def read_url(url: str | memoryview, param: str = "image_url") -> bytes | str:
    """The file that a data: URL holds, or the address that an http(s) one is.

    Raises:
        ApiError: any other URL, or bad base64.
    """
    begin = _beginning(url)
    if is_data_url(url):
        head, comma, _ = begin.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise _bad(param, "a data: URL is data:image/…;base64,…")
        return read_base64(url[len(head) + 1 :], param)
    try:
        scheme = urlsplit(begin).scheme
    except ValueError:
        scheme = ""
    if isinstance(url, str) and scheme in ("http", "https"):
        return url
    raise _bad(param, "a picture is a data: URL with base64; files of the server are not read")


def is_data_url(text: str | memoryview) -> bool:
    """Whether it holds a file itself, or wants to."""
    return _beginning(text)[:5].lower() == "data:"


def _beginning(text: str | memoryview) -> str:
    return text[:_HEAD_CHARACTERS] if isinstance(text, str) else bytes(text[:_HEAD_CHARACTERS]).decode("latin-1")


def read_base64(text: str | memoryview, param: str = "image_url") -> bytes:
    """The bytes that base64 spells; line breaks in a str are passed over.

    Raises:
        ApiError: it is no base64, or too much of it.
    """
    if len(text) > _BASE64_CHARACTERS + len(text) // 64:
        raise _bad(param, f"the picture is larger than {MAX_BYTES / 1e6:.0f} MB")
    if isinstance(text, str):
        text = text.replace("\n", "").replace("\r", "")
    try:
        pieces = [base64.b64decode(text[at : at + _PIECE], validate=True) for at in range(0, len(text), _PIECE)]
    except (binascii.Error, ValueError):
        raise _bad(param, "the picture's base64 cannot be read") from None
    if any(len(piece) < _PIECE // 4 * 3 for piece in pieces[:-1]):  # it ended before, by its padding
        raise _bad(param, "the picture's base64 cannot be read")
    return b"".join(pieces)


def of_input_error(error: InputError, question: Question) -> ApiError:
    """What is wrong with a question, or one of its pictures."""
    if isinstance(error, ImageError):
        return _bad(question.picture_param, str(error))
    if isinstance(error, PromptTooLongError):
        return invalid(str(error), question.param, "context_length_exceeded")
    return invalid(str(error), question.param)


def _bad(param: str, message: str) -> ApiError:
    return invalid(message, param, param)
