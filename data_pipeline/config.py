"""The data part of a recipe: which shards, in which words, packed how.

Owns the typed values only. `data_pipeline.build` turns them into a stream.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from models.spec import Config


class SourceConfig(Config):
    """One shard set: the directory that `tools.shards` made, and its share among several sources."""

    path: str
    """A directory, or an address (http, https, s3, …) below which its tars and `index/` lie; or some of its tars, with
    braces: `data/set/train-{000000..000009}.tar`."""
    cache: str | None = None
    """Where copies of a set at an address lie; by default below ~/.cache/sightline."""
    cache_gb: Annotated[float, Field(gt=0)] = 100
    """Tars of this set beyond so many gigabytes are evicted from the cache, longest unused first."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the draws, relative to the other sources; given for all sources or for none."""


class PlainTemplate(Config):
    """Picture, text, newline: no roles. LLaVA's first stage."""

    kind: Literal["plain"] = "plain"


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


class TokenizerTemplate(Config):
    """The chat template that lies in the tokenizer's own files."""

    kind: Literal["tokenizer"] = "tokenizer"


class PairTemplate(Config):
    """A picture and its text, for an objective that reads each by itself (image_text): what the user says is left out.

    Only the end token is a target, so that a pair counts as one.
    """

    kind: Literal["pair"] = "pair"


TemplateConfig = Annotated[
    PlainTemplate | VicunaTemplate | ChatmlTemplate | Llama3Template | TokenizerTemplate | PairTemplate,
    Field(discriminator="kind"),
]


class PadPacking(Config):
    """One sample a row; the batch is padded to its longest row."""

    kind: Literal["pad"] = "pad"


class RowPacking(Config):
    """Several samples a row of at most `row_tokens` tokens, best fit among `lookahead` waiting samples."""

    kind: Literal["pack"] = "pack"
    row_tokens: Annotated[int, Field(gt=0)]
    lookahead: Annotated[int, Field(gt=0)] = 8


class GroupPacking(Config):
    """One sample a row; rows of one global batch are of like length, chosen among `lookahead` samples of each slot."""

    kind: Literal["group"] = "group"
    lookahead: Annotated[int, Field(gt=0)] = 16


PackingConfig = Annotated[PadPacking | RowPacking | GroupPacking, Field(discriminator="kind")]


def _in_order(areas: tuple[float, float]) -> tuple[float, float]:
    if not 0 < areas[0] <= areas[1] <= 1:
        raise ValueError("give the smallest and the largest share, both above 0 and at most 1")
    return areas


class PictureAugment(Config):
    """Changes to training pictures, drawn anew each time a picture is seen. The defaults change nothing."""

    kind: Literal["picture"] = "picture"
    crop_area: Annotated[tuple[float, float], Field(strict=False), AfterValidator(_in_order)] = (1.0, 1.0)
    """A random cut keeps between these shares of the area; its proportions change by 4/3 at most."""
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Brightness, contrast and saturation each change by this share at most."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of pictures mirrored left to right. Mirrored text cannot be read, and left becomes right."""


class DataConfig(Config):
    """What a stage learns from. Sources without weights are one set, every sample of which is seen once an epoch."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    template: TemplateConfig
    packing: PackingConfig = PadPacking()
    max_length: Annotated[int, Field(gt=1)]
    """Longest sample in tokens, image tokens included. Nothing is ever cut."""
    jpeg: Literal["exact", "scaled"] = "exact"
    """`scaled` decodes JPEGs at 1/2, 1/4 or 1/8 where that leaves enough: faster, and not bit for bit what a bundle's
    processor makes."""
    augment: PictureAugment | None = None
    too_long: Literal["error", "skip", "fewer_tiles"] = "skip"
    """What becomes of a sample longer than that. `fewer_tiles`, under AnyRes: its pictures get the largest canvases
    that fit; where none does, it is skipped."""
    shuffle_window: Annotated[int, Field(gt=0)] = 4096
    num_workers: Annotated[int, Field(ge=0)] = 2
    bad_share_limit: Annotated[float, Field(ge=0, le=1)] = 0.05
