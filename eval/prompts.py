"""From a question about pictures to what a model takes.

Owns: `Turn` and `Query` (a chat and its pictures), `Prompt` (token ids and pixels of one query) and batches of prompts.
The chat template and the pixels are the bundle's processor's, exactly as stock transformers would apply them.

Shapes: B rows, L tokens, N pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image

from models.errors import InputError


@dataclass(frozen=True)
class Turn:
    """One turn of a chat."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Query:
    """A chat that waits for its next answer. The pictures stand before the first turn's text.

    Turns alternate and begin and end with the user's; anything else raises InputError.
    """

    pictures: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        roles = [turn.role for turn in self.turns]
        expected = ["user", "assistant"] * len(roles)
        if len(roles) % 2 == 0 or roles != expected[: len(roles)]:
            raise InputError(f"a chat alternates user, assistant, ..., user; this one is {', '.join(roles) or 'empty'}")


@dataclass(frozen=True)
class Prompt:
    """One query as the model takes it: `ids` with each picture's placeholders, and the processor's pixel tensors."""

    ids: list[int]
    pixels: dict[str, torch.Tensor]


def encode(processor: Any, query: Query) -> Prompt:
    """Render the chat and prepare its pictures. Control tokens that a turn's text spells stay plain text."""
    return _encode(processor, _messages(query), _guard(processor, query), add_generation_prompt=True)


def encode_answered(processor: Any, query: Query, answer: str, end_ids: frozenset[int]) -> tuple[Prompt, int]:
    """Render the chat with `answer` as its last turn: the prompt up to the answer's end token, and the target count.

    The template decides how an answer ends; where it puts no end token, one is added.
    """
    messages, guard = _messages(query), _guard(processor, query, answer)
    answered = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    question_ids = _plain_ids(processor, messages, guard, add_generation_prompt=True)
    chat_ids = _plain_ids(processor, answered, guard, add_generation_prompt=False)
    num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(question_ids, chat_ids, strict=False)))
    targets = chat_ids[num_shared:]
    num_kept = next((at + 1 for at, token in enumerate(targets) if token in end_ids), len(targets))
    prompt = _encode(processor, answered, guard, add_generation_prompt=False)
    ids = prompt.ids[: len(prompt.ids) - (len(targets) - num_kept)]
    if not targets or targets[num_kept - 1] not in end_ids:
        ids, num_kept = [*ids, min(end_ids)], num_kept + 1
    return Prompt(ids, prompt.pixels), num_kept


def collate(
    prompts: Sequence[Prompt], *, pad_id: int, side: Literal["left", "right"], device: torch.device
) -> dict[str, torch.Tensor]:
    """Pad to the longest: input_ids, attention_mask and position_ids (B, L), and the pictures of all rows in order."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids, mask = [], []
    for prompt in prompts:
        padding = [pad_id] * (longest - len(prompt.ids))
        real, blank = [1] * len(prompt.ids), [0] * len(padding)
        ids.append(padding + prompt.ids if side == "left" else prompt.ids + padding)
        mask.append(blank + real if side == "left" else real + blank)
    mask_BL = torch.tensor(mask)
    batch = {
        "input_ids": torch.tensor(ids),
        "attention_mask": mask_BL,
        "position_ids": (mask_BL.cumsum(dim=-1) - 1).clamp(min=0),
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return batch | stack_pixels([prompt.pixels for prompt in prompts], device)


def stack_pixels(pixels: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """The processor's tensors of several prompts as one of each name, the pictures in order.

    Where pictures have several tiles, those with fewer get blank ones behind, as the processor itself adds them.
    """
    names = dict.fromkeys(name for each in pixels for name in each)
    parts = {name: [each[name] for each in pixels if name in each] for name in names}
    for tensors in parts.values():
        if tensors[0].ndim == 5:  # pictures, tiles, channels, height, width
            most = max(tensor.shape[1] for tensor in tensors)
            tensors[:] = [F.pad(tensor, (0, 0) * 3 + (0, most - tensor.shape[1])) for tensor in tensors]
    return {name: torch.cat(tensors).to(device) for name, tensors in parts.items()}


def _messages(query: Query) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in query.turns
    ]
    messages[0]["content"] = [{"type": "image", "image": picture} for picture in query.pictures] + messages[0][
        "content"
    ]
    return messages


def _guard(processor: Any, query: Query, *more: str) -> dict[str, bool]:
    """What keeps control tokens that a text spells plain text. Without any, prompts are rendered as stock ones are."""
    tokens = {processor.image_token, *processor.tokenizer.all_special_tokens}
    texts = [turn.text for turn in query.turns] + list(more)
    return {"sanitize_control_tokens": True} if any(token in text for token in tokens for text in texts) else {}


def _encode(
    processor: Any, messages: list[dict[str, Any]], guard: dict[str, bool], *, add_generation_prompt: bool
) -> Prompt:
    try:
        encoded = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=add_generation_prompt,
            **guard,
        )
    except NotImplementedError as error:  # where not the template but the tokenizer begins a text
        raise InputError("the chat spells one of the model's control tokens: leave it out") from error
    pixels = {name: value for name, value in encoded.items() if name not in ("input_ids", "attention_mask")}
    return Prompt(encoded["input_ids"][0].tolist(), pixels)


def _plain_ids(
    processor: Any, messages: list[dict[str, Any]], guard: dict[str, bool], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids with one placeholder a picture; enough to see where the answer begins, and far cheaper."""
    encoded = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
        **guard,
    )
    return list(encoded["input_ids"])
