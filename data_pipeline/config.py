"""The data part of a recipe: which shards, under which chat template, packed how.

Owns only the typed values. `data_pipeline.build` makes a stream from them.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from models.spec import Config, Name


class SourceConfig(Config):
    """One shard set: the directory that `tools.shards` made, and its share among several sources."""

    path: str
    """A directory, or an address (http, https, s3, …) with its tars and `index/`; or some of its tars, with
    braces: `data/set/train-{000000..000009}.tar`.
    """
    cache: str | None = None
    """The directory for copies of a remote set; by default below ~/.cache/sightline."""
    cache_gb: Annotated[float, Field(gt=0, le=1e9)] = 100
    """The cache's limit for this set's tars in GB; the least recently used are evicted first."""
    weight: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Share of the draws, relative to the other sources; given for all sources or for none."""


class PlainTemplate(Config):
    """Image, text, newline: no roles. LLaVA's first stage."""

    kind: Literal["plain"] = "plain"
    opening: str | Literal[True] | None = True
    """What every sample begins with, behind the begin token where the tokenizer adds one. True: nothing where it does,
    else what the tokenizer's own chat template prints right before a user's text, from its last special token. None:
    the first token of that template. A language model parks attention on its first position (Xiao et al. 2023,
    arXiv:2309.17453), where a new projector's features make gradients that bf16 cannot carry.
    """


class VicunaTemplate(Config):
    """`USER: … ASSISTANT: …</s>` after Vicuna v1's system sentence."""

    kind: Literal["vicuna_v1"] = "vicuna_v1"


class ChatmlTemplate(Config):
    """`<|im_start|>role … <|im_end|>` (Qwen, SmolLM). No system turn unless one is given here or in the data."""

    kind: Literal["chatml"] = "chatml"
    system: str | None = None


class Llama3Template(Config):
    """`<|start_header_id|>role<|end_header_id|> … <|eot_id|>`."""

    kind: Literal["llama3"] = "llama3"
    system: str | None = None


def _is_day(text: str) -> str:
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise ValueError("write the day as YYYY-MM-DD")
    return datetime.date.fromisoformat(text).isoformat()


class TokenizerTemplate(Config):
    """The chat template in the tokenizer's own files."""

    kind: Literal["tokenizer"] = "tokenizer"
    date: Annotated[str, AfterValidator(_is_day)] | None = None
    """The day (YYYY-MM-DD) for a template that writes the present date; needed there, and without effect elsewhere."""
    opening: str = ""
    """Put before what the template prints, for one that prints the user's text, so the image, at the very front."""


class ModelTemplate(Config):
    """The chat template that lies in the directory of a published model, images as the parts of a turn."""

    kind: Literal["model"] = "model"


class PairTemplate(Config):
    """An image and its text, for an objective that reads each separately (image_text): user turns are left out.

    Only the end token is a target, so that a pair counts as one.
    """

    kind: Literal["pair"] = "pair"


TemplateConfig = Annotated[
    PlainTemplate | VicunaTemplate | ChatmlTemplate | Llama3Template | TokenizerTemplate | ModelTemplate | PairTemplate,
    Field(discriminator="kind"),
]


class PadPacking(Config):
    """One sample per row; the batch is padded to its longest row."""

    kind: Literal["pad"] = "pad"


class RowPacking(Config):
    """Several samples per row of at most `row_tokens` tokens, best fit among `lookahead` waiting samples."""

    kind: Literal["pack"] = "pack"
    row_tokens: Annotated[int, Field(gt=0, le=10**8)]
    lookahead: Annotated[int, Field(gt=0, le=10**6)] = 8


class GroupPacking(Config):
    """One sample per row; a global batch's rows have similar lengths, chosen among `lookahead` samples of each slot."""

    kind: Literal["group"] = "group"
    lookahead: Annotated[int, Field(gt=0, le=10**6)] = 16


PackingConfig = Annotated[PadPacking | RowPacking | GroupPacking, Field(discriminator="kind")]


def _in_order(areas: tuple[float, float]) -> tuple[float, float]:
    if not 0 < areas[0] <= areas[1] <= 1:
        raise ValueError("give the smallest and the largest share, both above 0 and at most 1")
    return areas


class ImageAugment(Config):
    """Changes to training images, drawn anew each time an image is seen. The defaults change nothing."""

    kind: Literal["picture"] = "picture"
    crop_area: Annotated[tuple[float, float], Field(strict=False), AfterValidator(_in_order)] = (1.0, 1.0)
    """A random crop keeps between these shares of the area; its aspect ratio changes by 4/3 at most."""
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Brightness, contrast and saturation each change by this share at most."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of images mirrored left to right. Mirroring makes text unreadable and swaps left and right."""


class DataConfig(Config):
    """A stage's training data. Sources without weights form one set, each of whose samples is seen once per epoch."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    template: TemplateConfig
    control_tokens: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Control tokens that answers may write, `<think>` for one: all others are text where the data spell them."""
    packing: PackingConfig = PadPacking()
    max_length: Annotated[int, Field(gt=1, le=10**8)]
    """Longest sample in tokens, image tokens included. Nothing is ever cut."""
    jpeg: Literal["exact", "scaled"] = "exact"
    """`scaled` decodes JPEGs at 1/2, 1/4 or 1/8 where that leaves enough: faster, and not bit for bit what a bundle's
    processor makes."""
    augment: ImageAugment | None = None
    too_long: Literal["error", "skip", "fewer_tiles", "shrink"] = "skip"
    """What to do with a sample longer than `max_length`. `fewer_tiles`, under AnyRes: its images get the largest
    canvases that fit; `shrink`, at native resolution: all its images get the largest area that fits; where none does,
    it is skipped.
    """
    shuffle_window: Annotated[int, Field(gt=0, le=10**9)] = 4096
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 2
    bad_share_limit: Annotated[float, Field(ge=0, le=1)] = 0.05
