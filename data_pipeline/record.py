"""What a sample's files mean: pictures and the turns of a conversation.

Owns the accepted layouts of a sample and LLaVA's placing of the image tag. Does not own words around the turns
(`templates`) nor pixels (`images`).

    KEY.jpg | KEY.0.jpg KEY.1.jpg …   the pictures, in the order of their numbers
    KEY.json                          {"conversations": [{"from": "human" | "gpt" | "system", "value": …}, …]}
                                      or {"prompt": …, "text": …}; other keys are passed over
    KEY.txt                           a caption, read where no such JSON is there
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_pipeline.images import PICTURE_EXTENSIONS
from models.errors import InputError
from models.spec import IMAGE_TOKEN

Role = Literal["system", "user", "assistant"]

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_PICTURE = re.compile(r"^(?:(\d+)\.)?([a-z0-9]+)$")


class RecordError(InputError):
    """A sample whose files do not make a conversation."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn. Pictures stand in `text` as `<image>`, in the order in which they come."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """A sample, read but not yet tokenized: encoded pictures and turns."""

    pictures: tuple[bytes, ...]
    turns: tuple[Turn, ...]


def read_record(files: Mapping[str, bytes]) -> Record:
    """Make a record of a sample's files (extension -> bytes).

    Raises:
        RecordError: no text, JSON of another shape, turns out of order, or tags and pictures that differ in number.
    """
    pictures = tuple(files[extension] for extension in picture_extensions(files))
    turns = _turns(files, len(pictures))
    check_turns(turns, len(pictures))
    return Record(pictures, turns)


def picture_extensions(extensions: Mapping[str, Any]) -> list[str]:
    """Those that are pictures, in the order of their numbers (`0.jpg` before `10.jpg`)."""
    found: list[tuple[int, str]] = []
    for extension in extensions:
        match = _PICTURE.match(extension)
        if match and match[2] in PICTURE_EXTENSIONS:
            found.append((int(match[1] or 0), extension))
    return [extension for _, extension in sorted(found)]


def _turns(files: Mapping[str, bytes], num_pictures: int) -> tuple[Turn, ...]:
    content = _json(files["json"]) if "json" in files else {}
    if "conversations" in content:
        return parse_conversation(content["conversations"])
    if isinstance(content.get("text"), str):
        return caption_turns(content["text"], str(content.get("prompt") or ""), num_pictures)
    if "txt" in files:
        return caption_turns(_text(files["txt"]), "", num_pictures)
    if "json" in files:
        raise RecordError("the JSON has neither `conversations` nor `text`")
    raise RecordError("no text: neither a .txt nor a .json")


def _text(payload: bytes) -> str:
    try:
        return payload.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise RecordError("the text is not UTF-8") from None


def _json(payload: bytes) -> dict[str, Any]:
    try:
        content = json.loads(payload.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise RecordError("the JSON cannot be read") from None
    if not isinstance(content, dict):
        raise RecordError(f"the JSON is a {type(content).__name__}, expected an object")
    return content


def caption_turns(text: str, prompt: str, num_pictures: int) -> tuple[Turn, ...]:
    """A caption or an answer as a conversation of two turns, the pictures first."""
    tags = "\n".join([IMAGE_TOKEN] * num_pictures)
    return Turn("user", "\n".join(part for part in (tags, prompt) if part)), Turn("assistant", text)


def parse_conversation(value: object) -> tuple[Turn, ...]:
    """LLaVA's `conversations` list as turns."""
    if not isinstance(value, list) or not value:
        raise RecordError("`conversations` is empty or not a list")
    return tuple(_turn(item) for item in value)


def _turn(item: object) -> Turn:
    if not isinstance(item, dict):
        raise RecordError("a turn is not an object with `from` and `value`")
    role = _ROLES.get(str(item.get("from", item.get("role"))))
    text = item.get("value", item.get("content"))
    if role is None or not isinstance(text, str):
        raise RecordError(f"a turn by {item.get('from', item.get('role'))!r} without text; known: {', '.join(_ROLES)}")
    return Turn(role, place_image_tag(text))


def place_image_tag(text: str) -> str:
    """A single image tag goes to the front, on a line of its own, as LLaVA's `preprocess_multimodal` puts it.

    Several tags stay where they are: the text around them says which picture is meant.
    """
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def check_turns(turns: tuple[Turn, ...], num_pictures: int) -> None:
    """Turns alternate user, assistant after an optional system turn, and every picture has its tag."""
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected: list[Role] = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        raise RecordError(f"turns must alternate user, assistant; found {', '.join(roles[:6])}")
    if not any(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise RecordError("nothing to learn: the answers are empty")
    num_tags = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
    if num_tags != num_pictures:
        raise RecordError(f"{num_pictures} pictures but {num_tags} {IMAGE_TOKEN} tags in the user's turns")
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role != "user"):
        raise RecordError(f"an {IMAGE_TOKEN} tag outside the user's turns")
