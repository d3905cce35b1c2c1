"""Which part a tensor of a published VLM belongs to, and its name there. Loads without torch.

    vision_tower.vision_model.X, vision_tower.X             -> vision     X
    multi_modal_projector.X, image_newline                  -> projector  X, newline.weight
    language_model.model.X, language_model.lm_head.X        -> language   model.X, lm_head.X
    future.X                                                -> future     X
    visual.merger.X, visual.deepstack_merger_list.X         -> projector  merger.X, deepstack_merger_list.X
    visual.X                                                -> vision     X
    model.layers.X, model.embed_tokens.X, model.norm.X      -> language   the same, beside `visual.`

and the same behind `model.`, as transformers 4.52 and some later versions wrote them, where the language model is
`model.language_model.X` and its head `lm_head.X`. Source: transformers' conversion_mapping.py, entries `llava` and
`qwen2_vl`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

NEWLINE = "newline.weight"
"""The name in a projector of LLaVA-NeXT's `image_newline` (`models.anyres`)."""

COMPUTED = ("position_ids", "rotary_emb.inv_freq")
"""Ends of names that older files have and that every loader computes itself."""


_OF_DECODER = ("layers", "embed_tokens", "norm")
_MERGERS = ("merger.", "deepstack_merger_list.")


class Place(NamedTuple):
    """A part of the model, and a tensor's name in the part's class."""

    part: str
    name: str


def place_of(raw: str) -> Place | None:
    """The place of a tensor by its name in the files; None for one that no part has."""
    if raw.endswith(COMPUTED):
        return None
    name = raw.removeprefix("model.")
    head, _, rest = name.partition(".")
    is_later = name != raw
    if is_later and head in _OF_DECODER:
        return Place("language", raw)
    if head == "visual":
        return Place("projector" if rest.startswith(_MERGERS) else "vision", rest)
    places = {
        "image_newline": Place("projector", NEWLINE),
        "vision_tower": Place("vision", rest.removeprefix("vision_model.")),
        "multi_modal_projector": Place("projector", rest),
        "language_model": Place("language", f"model.{rest}" if is_later else rest),
    }
    top = {"lm_head": Place("language", raw), "future": Place("future", rest)}
    return places.get(head) or (None if is_later else top.get(head))


def names_of_part(raw_names: Iterable[str], part: str) -> dict[str, str]:
    """The tensors of one part: name in the part -> name in the files."""
    places = ((place_of(raw), raw) for raw in raw_names)
    return {place.name: raw for place, raw in places if place is not None and place.part == part}
