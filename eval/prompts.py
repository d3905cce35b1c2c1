"""From a question about images to a model's inputs.

Owns: `Prompt` (token ids and pixels of one `eval.query.Query`) and batches of prompts.
The chat template and the pixels are the bundle's processor's, exactly as stock transformers would apply them.

Shapes: B rows, L tokens, N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data_pipeline import limits
from eval.large_images import affordable, bytes_needed, without_copies
from eval.pixels import GRIDS, NO_PIXELS, Pixels, recording, stack_pixels
from eval.query import ImageFile, Place, Query
from models.common.errors import InputError, single_line
from models.patches import rope_positions
from models.spec import PatchGrid


class PromptTooLongError(InputError):
    """A chat that leaves no room for an answer."""


_OF_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
"""What a processor returns beside pixels."""

_PROBE = "\ue000"
"""Stands for a system text: a private character, which no template prints itself."""

_STAND_IN = Image.new("RGB", (1, 1))
"""What stock code gets in the place of an image whose pixels are known."""


@dataclass(frozen=True)
class Prompt:
    """One query as the model's input: `ids` with each image's placeholders, and the images' pixels."""

    ids: list[int]
    pixels: Pixels = NO_PIXELS
    positions_3L: torch.Tensor | None = None
    """Positions by time, row and column (M-RoPE), of a chat with images whose patches have such; None: 0, 1, 2, ..."""

    def from_token(self, first: int, *, has_positions: bool) -> Prompt:
        """The text from a token on, without images; `has_positions` where others in its batch have some by row."""
        positions = self.positions_3L
        if positions is None and has_positions:
            positions = torch.arange(len(self.ids)).expand(3, -1)
        return Prompt(self.ids[first:], NO_PIXELS, None if positions is None else positions[:, first:])

    def with_ids(self, ids: list[int]) -> Prompt:
        """The same images with another end of the text, at most one token longer."""
        positions = self.positions_3L
        if positions is not None:
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)[:, : len(ids)]
        return Prompt(ids, self.pixels, positions)


def encode(processor: Any, query: Query, pixels: Pixels | None = None) -> Prompt:
    """Render the chat and prepare its images. Control tokens that a turn's text spells stay plain text.

    Args:
        pixels: those of an earlier prompt about the same images, which are then not even opened.

    Raises:
        InputError: an image beyond `data_pipeline.limits`, or a system turn where the template has none.
    """
    if query.has_system and not takes_system(processor):
        raise InputError("the model's chat template has no system turns: say it in the first question")
    return _encode(processor, _messages(query), _guard(processor, query), pixels, add_generation_prompt=True)


def takes_system(processor: Any) -> bool:
    """Whether the chat template prints a system turn's text; some leave it out, and some refuse it."""
    probe = [("system", _PROBE), ("user", "a")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in probe]
    try:
        return _PROBE in str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError:
        return False


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
    prompt = _encode(processor, answered, guard, None, add_generation_prompt=False)
    ids = prompt.ids[: len(prompt.ids) - (len(targets) - num_kept)]
    if not targets or targets[num_kept - 1] not in end_ids:
        ids, num_kept = [*ids, min(end_ids)], num_kept + 1
    return prompt.with_ids(ids), num_kept


def collate(
    prompts: Sequence[Prompt], *, pad_id: int, side: Literal["left", "right"], device: torch.device
) -> dict[str, torch.Tensor]:
    """Pad to the longest: input_ids, attention_mask and position_ids (B, L), and the images of all rows in order.

    With positions by time, row and column position_ids are (3, B, L).
    """
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
    if any(prompt.positions_3L is not None for prompt in prompts):
        batch["position_ids"] = _by_row(prompts, longest, side)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return batch | stack_pixels([prompt.pixels.tensors for prompt in prompts], device)


def _by_row(prompts: Sequence[Prompt], longest: int, side: Literal["left", "right"]) -> torch.Tensor:
    """Positions [3, B, L]; those of padding are 0."""
    rows = []
    for prompt in prompts:
        positions_3L = prompt.positions_3L
        if positions_3L is None:
            positions_3L = torch.arange(len(prompt.ids)).expand(3, -1)
        blank = longest - len(prompt.ids)
        rows.append(F.pad(positions_3L, (blank, 0) if side == "left" else (0, blank)))
    return torch.stack(rows, dim=1)


def _messages(query: Query) -> list[dict[str, Any]]:
    first = 1 if query.has_system else 0
    places = query.places or tuple(Place(first) for _ in query.images)
    images: list[list[tuple[int, Image.Image | ImageFile]]] = [[] for _ in query.turns]
    for image, place in zip(query.images, places, strict=True):
        images[place.turn].append((place.at, image))
    return [
        {"role": turn.role, "content": _parts(turn.text, here)} for turn, here in zip(query.turns, images, strict=True)
    ]


def _parts(text: str, images: Sequence[tuple[int, Image.Image | ImageFile]]) -> list[dict[str, Any]]:
    """A turn's content: its text with its images between, each before the character that its number says."""
    parts: list[dict[str, Any]] = []
    start = 0
    for at, image in images:
        if at > start:
            parts.append({"type": "text", "text": text[start:at]})
        parts.append({"type": "image", "image": image})
        start = at
    if start < len(text) or not parts or not start:
        parts.append({"type": "text", "text": text[start:]})
    return parts


def _guard(processor: Any, query: Query, *more: str) -> dict[str, bool]:
    """What keeps control tokens that a text spells plain text. Without any, prompts are rendered as stock ones are.

    Every added token counts: Llama-3's are special without being in `all_special_tokens`
    (https://github.com/huggingface/transformers/issues/47386).
    """
    added = getattr(processor.tokenizer, "added_tokens_decoder", {}).values()
    tokens = {processor.image_token, *processor.tokenizer.all_special_tokens, *(str(token) for token in added)}
    texts = [turn.text for turn in query.turns] + list(more)
    return {"sanitize_control_tokens": True} if any(token in text for token in tokens for text in texts) else {}


def _encode(
    processor: Any,
    messages: list[dict[str, Any]],
    guard: dict[str, bool],
    pixels: Pixels | None,
    *,
    add_generation_prompt: bool,
) -> Prompt:
    num_bytes = 0
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        part["image"] = _STAND_IN if pixels is not None else _opened(processor, part["image"])
        num_bytes += bytes_needed(processor.image_processor, part["image"])
    own = recording(without_copies(processor), None if pixels is None else pixels.output)
    try:
        with limits.MEMORY.taken(num_bytes):
            encoded = own.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=add_generation_prompt,
                **guard,
            )
    except NotImplementedError as error:  # where not the template but the tokenizer begins a text
        raise InputError("the chat spells one of the model's control tokens: leave it out") from error
    except jinja2.TemplateError as error:  # a template may refuse what it was not made for
        raise InputError(f"the model's chat template refuses this chat: {single_line(error)}") from error
    ids = encoded["input_ids"][0].tolist()
    if pixels is None:
        tensors = {name: value for name, value in encoded.items() if name not in _OF_TEXT}
        pixels = Pixels(tensors, own.image_processor.output)
    return Prompt(ids, pixels, _positions(processor, ids, pixels.tensors))


def _opened(processor: Any, image: Image.Image | ImageFile) -> Image.Image:
    return affordable(processor.image_processor, image.open() if isinstance(image, ImageFile) else image)


def _positions(processor: Any, ids: list[int], pixels: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """M-RoPE's positions of a chat whose images have rows and columns of patches; None for another."""
    if GRIDS not in pixels:
        return None
    images = processor.image_processor
    grid = PatchGrid(patch_size=int(images.patch_size), merge=int(images.merge_size))
    sizes = [(rows * grid.patch_size, columns * grid.patch_size) for _, rows, columns in pixels[GRIDS].tolist()]
    return torch.from_numpy(rope_positions(np.array(ids) == processor.image_token_id, sizes, grid))


def _plain_ids(
    processor: Any, messages: list[dict[str, Any]], guard: dict[str, bool], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids with one placeholder an image; enough to see where the answer begins, and far cheaper."""
    encoded = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
        **guard,
    )
    return list(encoded["input_ids"])
