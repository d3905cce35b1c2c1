"""Data configuration -> an open stream. The one constructor that a trainer calls.

Owns the choice of parts and the fingerprint of everything the order depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.augment import Augmenter
from data_pipeline.config import DataConfig, RowPacking
from data_pipeline.encode import Encoder
from data_pipeline.index import ShardIndex
from data_pipeline.mixture import Concatenation, Mixture, Plan
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.source import open_index
from data_pipeline.stream import Limits, RowStream
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.errors import InputError
from models.spec import IMAGE_TOKEN, AnyResImage, ImageSpec, TextSpec


def open_stream(
    config: DataConfig,
    *,
    tokenizer: Any,
    image: ImageSpec,
    text: TextSpec,
    seed: int,
    num_slots: int,
    slots: range,
    epochs: int | None,
    quarantine: Path | None,
) -> RowStream:
    """Open the sources and make the stream of the local slots.

    Args:
        tokenizer: a transformers tokenizer that holds `<image>` as one special token.
        num_slots: rows of the global batch: micro-batch x accumulation x world size.
        slots: this rank's run of them.
        epochs: how often every sample is seen; None: without end.

    Raises:
        InputError: a source without shards or index, weights for some sources only, lengths that do not fit, a
            tokenizer that lacks a token, choices about pictures that exclude each other.
    """
    _check_lengths(config, text)
    _check_pictures(config, image)
    tokens = Tokens.of(tokenizer)
    if tokens.image_token_id != text.image_token_id:
        raise InputError(
            f"{IMAGE_TOKEN} is {tokens.image_token_id} in the tokenizer, {text.image_token_id} in the model"
        )
    indexes = [open_index(source) for source in config.sources]
    plan = build_plan(config, indexes, seed, num_slots)
    encoder = Encoder(
        indexes,
        plan,
        template=build_template(config.template, tokens),
        tokens=tokens,
        image=image,
        max_length=config.max_length,
        scaled_jpeg=config.jpeg == "scaled",
        augmenter=Augmenter(config.augment, seed) if config.augment is not None else None,
        fewer_tiles=config.too_long == "fewer_tiles",
    )
    return RowStream(
        encoder,
        plan,
        fingerprint=order_fingerprint(config, indexes),
        seed=seed,
        num_slots=num_slots,
        slots=slots,
        packing=config.packing,
        num_workers=config.num_workers,
        epochs=epochs,
        limits=Limits(config.bad_share_limit, config.too_long == "error", quarantine),
        read_ahead=ReadAhead(indexes, plan, num_slots // len(slots)),
    )


def _check_lengths(config: DataConfig, text: TextSpec) -> None:
    if config.max_length > text.max_length:
        raise InputError(f"data.max_length is {config.max_length}, the language model takes {text.max_length} at most")
    if isinstance(config.packing, RowPacking) and config.packing.row_tokens < config.max_length:
        raise InputError(
            f"packing.row_tokens is {config.packing.row_tokens}, smaller than max_length {config.max_length}: a sample"
            " might fit no row"
        )


def _check_pictures(config: DataConfig, image: ImageSpec) -> None:
    is_anyres = isinstance(image.fit, AnyResImage)
    if config.jpeg == "scaled" and is_anyres:
        raise InputError(
            "data.jpeg is scaled, which would change the size that AnyRes chooses tiles by: set jpeg: exact"
        )
    if config.too_long == "fewer_tiles" and not is_anyres:
        raise InputError(f"data.too_long is fewer_tiles, but image fit {image.fit.kind} has one: set skip or error")


def build_plan(config: DataConfig, indexes: Sequence[ShardIndex], seed: int, num_slots: int) -> Plan:
    """The order of one or several sources.

    Raises:
        InputError: an empty source, or weights for some sources only.
    """
    for source, index in zip(config.sources, indexes, strict=True):
        if len(index) == 0:
            raise InputError(f"{source.path} holds no samples")
    shards = [index.shard_sizes for index in indexes]
    weights = [source.weight for source in config.sources if source.weight is not None]
    if not weights:
        return Concatenation(shards, seed, num_slots, config.shuffle_window)
    if len(weights) != len(config.sources):
        raise InputError("data.sources: give a weight to every source, or to none")
    return Mixture(shards, weights, seed, num_slots, config.shuffle_window)


def order_fingerprint(config: DataConfig, indexes: Sequence[ShardIndex]) -> str:
    """Changes with the samples, their mixture and the shuffle window: with whatever a stream's state relies on."""
    facts = {
        "sources": [index.fingerprint for index in indexes],
        "weights": [source.weight for source in config.sources],
        "window": config.shuffle_window,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
