"""A sample's files -> its images and the turns of its conversation.

Owns the accepted layouts of a sample and LLaVA's placing of the image tag. Does not own the text around the turns
(`templates`) nor pixels (`images`).

    KEY.jpg | KEY.0.jpg KEY.1.jpg …   the images, in the order of their numbers; their content says that they are some
    KEY.json                          {"conversations": [{"from": "human" | "gpt" | "system", "value": …}, …]},
                                      {"messages": [{"role": …, "content": …}, …]} or {"prompt": …, "text": …}; other
                                      keys are ignored
    KEY.txt                           a caption, read where no such JSON is there

A video, as a file or in the JSON, is refused: a sample has images and text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_pipeline.image_kinds import (
    IMAGE_EXTENSIONS,
    UNREADABLE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    advice_by_ending,
    cannot_be_read,
    image_kind,
)
from data_pipeline.images import has_heic
from data_pipeline.limits import text_problem
from models.common.documents import parse
from models.common.errors import InputError
from models.spec import IMAGE_TOKEN

Role = Literal["system", "user", "assistant"]

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_IMAGE = re.compile(r"^(?:([0-9]+)\.)?([a-z0-9]+)$")
_TEXTS = ("json", "txt")
VIDEO_FIELDS = ("video", "videos")
"""Keys under which the field's formats name a sample's videos."""

_COMPRESSED = ("gz", "bz2", "xz", "zst")
"""Endings of members that nobody decompresses: `KEY.jpg.gz` is an image that is not read."""


NO_VIDEO = (
    "a video, which is not read: put frames of it in as images (KEY.0.jpg, KEY.1.jpg, …), or leave the sample out"
)
"""What is said of a sample that has one."""


class RecordError(InputError):
    """A sample whose files do not make a conversation."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a chat. A `Record`'s images appear in `text` as `<image>`, in their order."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """A sample, read but not yet tokenized: encoded images and turns."""

    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]


def read_record(files: Mapping[str, bytes]) -> Record:
    """Make a record of a sample's files (extension -> bytes).

    Raises:
        RecordError: no text, JSON of another shape, turns out of order, or tags and images that differ in number.
    """
    if problem := images_problem(files):
        raise RecordError(problem)
    images = tuple(files[extension] for extension in image_extensions(files))
    return Record(images, read_turns(files, len(images)))


def read_turns(texts: Mapping[str, bytes], num_images: int) -> tuple[Turn, ...]:
    """The conversation of a sample's texts: the one check that whatever is written or read passes through.

    Images without any tag get theirs in front of the first question.

    Raises:
        RecordError: as `read_record`.
    """
    turns = _tagged(_turns(texts, num_images), num_images)
    check_turns(turns, num_images)
    return turns


def _tagged(turns: tuple[Turn, ...], num_images: int) -> tuple[Turn, ...]:
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(IMAGE_TOKEN in turn.text for turn in turns):
        return turns
    text = "\n".join([IMAGE_TOKEN] * num_images + [turns[first].text] * bool(turns[first].text))
    return (*turns[:first], Turn("user", text), *turns[first + 1 :])


def images_problem(heads: Mapping[str, bytes]) -> str:
    """Why a sample's images cannot all be used, by their names and first 32 bytes; empty where they can."""
    if videos := [extension for extension in heads if extension.rsplit(".", 1)[-1] in VIDEO_EXTENSIONS]:
        return f"{videos[0]} is {NO_VIDEO}"
    images = image_extensions(heads)
    for extension in images:
        if reason := cannot_be_read(heads[extension], heic=has_heic()):
            return f"{extension} is {reason}"
    others = [name for name in heads if name not in images and _is_picture(name, heads[name])]
    if images or not others:
        return ""
    reason = cannot_be_read(heads[others[0]], heic=has_heic()) or advice_by_ending(others[0])
    return f"{', '.join(others[:4])}: " + (
        f"it is {reason}" if reason else "images that nobody reads; name them KEY.jpg, or KEY.0.jpg, KEY.1.jpg, …"
    )


def image_extensions(extensions: Mapping[str, Any]) -> list[str]:
    """Those that are images, by name or content, in the order of their numbers (`0.jpg` before `10.jpg`)."""
    found: list[tuple[int, str]] = []
    for extension, content in extensions.items():
        match, is_image = _IMAGE.match(extension), isinstance(content, bytes) and image_kind(content) is not None
        if match and extension not in _TEXTS and is_read(extension, is_image=is_image):
            found.append((int(match[1] or 0), extension))
    return [extension for _, extension in sorted(found)]


def is_read(extension: str, *, is_image: bool) -> bool:
    """Whether a member of this name counts for a sample: its text, or an image that is named as one.

    Args:
        is_image: whether the content is an image, whatever the ending says.
    """
    match = _IMAGE.match(extension)
    return extension in _TEXTS or bool(
        match and (match[2] in IMAGE_EXTENSIONS or (is_image and match[2] not in UNREADABLE_EXTENSIONS))
    )


def _is_picture(extension: str, content: bytes) -> bool:
    endings = [ending for ending in extension.split(".") if ending not in _COMPRESSED]
    is_named = endings[-1:] and endings[-1] in IMAGE_EXTENSIONS | UNREADABLE_EXTENSIONS
    return bool(is_named) or image_kind(content) is not None


def _turns(files: Mapping[str, bytes], num_images: int) -> tuple[Turn, ...]:
    content = _json(files["json"]) if "json" in files else {}
    if named := next((key for key in VIDEO_FIELDS if content.get(key)), None):
        raise RecordError(f"`{named}` of the JSON names {NO_VIDEO}")
    chat = content.get("conversations", content.get("messages"))
    if chat is not None:
        return parse_conversation(chat)
    if isinstance(content.get("text"), str):
        return caption_turns(content["text"], str(content.get("prompt") or ""), num_images)
    if "txt" in files:
        return caption_turns(_text(files["txt"]), "", num_images)
    if "json" in files:
        raise RecordError("the JSON has neither `conversations` nor `text`")
    raise RecordError("no text: neither a .txt nor a .json")


def _text(payload: bytes) -> str:
    try:
        return payload.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise RecordError("the text is not UTF-8") from None


def _json(payload: bytes) -> dict[str, Any]:
    try:
        content = parse(payload.decode("utf-8-sig"), "the JSON")
    except (ValueError, InputError):
        raise RecordError("the JSON cannot be read") from None
    if not isinstance(content, dict):
        raise RecordError(f"the JSON is a {type(content).__name__}, expected an object")
    return content


def caption_turns(text: str, prompt: str, num_images: int) -> tuple[Turn, ...]:
    """A caption or an answer as a conversation of two turns, the images first, unless the prompt places them."""
    if num_images and prompt.count(IMAGE_TOKEN) == num_images:
        return Turn("user", place_image_tag(prompt)), Turn("assistant", text)
    tags = "\n".join([IMAGE_TOKEN] * num_images)
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
    if isinstance(text, list) and any(_is_video(part) for part in text):
        raise RecordError(f"a turn holds {NO_VIDEO}")
    if role is None or not isinstance(text, str):
        raise RecordError(f"a turn by {item.get('from', item.get('role'))!r} without text; known: {', '.join(_ROLES)}")
    return Turn(role, place_image_tag(text))


def _is_video(part: object) -> bool:
    """Whether a part of a message's content is one, as transformers and OpenAI's clients write it."""
    return isinstance(part, dict) and str(part.get("type", "")).startswith("video")


def place_image_tag(text: str) -> str:
    """A single image tag goes to the front, on a line of its own, as LLaVA's `preprocess_multimodal` puts it.

    Several tags stay where they are: the text around them says which image is meant.
    """
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def check_turns(turns: tuple[Turn, ...], num_images: int) -> None:
    """Turns alternate user, assistant after an optional system turn, images have tags, and every text can be used."""
    for turn in turns:
        if problem := text_problem(turn.text):
            raise RecordError(f"the text {problem}")
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected: list[Role] = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        raise RecordError(f"turns must alternate user, assistant; found {', '.join(roles[:6])}")
    if not any(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise RecordError("nothing to learn: the answers are empty")
    num_tags = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
    if num_tags != num_images:
        raise RecordError(f"{num_images} images but {num_tags} {IMAGE_TOKEN} tags in the user's turns")
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role != "user"):
        raise RecordError(f"an {IMAGE_TOKEN} tag outside the user's turns")
