"""Data configuration -> an open stream. The only function that a trainer calls to get one.

Owns the choice of parts and the fingerprint of everything the order depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.augment import Augmenter
from data_pipeline.config import DataConfig, RowPacking
from data_pipeline.encode import Encoder, ImageHandling
from data_pipeline.fetch import Fetcher
from data_pipeline.index import ShardIndex
from data_pipeline.mixture import Concatenation, Mixture, Plan
from data_pipeline.read_ahead import MAX_LOCAL_RANKS, ReadAhead
from data_pipeline.sample_order import OrderIdentity, SampleOrder
from data_pipeline.source import open_index
from data_pipeline.stream import Limits, RowStream
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from data_pipeline.unused import remarks
from models.common.errors import InputError
from models.spec import IMAGE_TOKEN, ImageSpec, TextSpec

logger = logging.getLogger(__name__)


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
        slots: this rank's contiguous range of them.
        epochs: how often every sample is seen; None: without end.

    Raises:
        InputError: a source without shards or index, weights for some sources only, lengths that do not fit, a
            tokenizer that lacks a token, image options that exclude each other.
    """
    _check_lengths(config, text)
    _check_images(config, image)
    tokens = Tokens.of(tokenizer, text.image_token)
    if tokens.image_token_id != text.image_token_id:
        raise InputError(
            f"{tokens.image_token} is {tokens.image_token_id} in the tokenizer, {text.image_token_id} in the model"
        )
    order = build_order(config, [open_index(source) for source in config.sources], seed, num_slots)
    for index in order.indexes:
        num_ranks = min(MAX_LOCAL_RANKS, num_slots // len(slots))
        index.read_at_once(num_open_shards(index, len(slots), config.shuffle_window), num_ranks)
        for remark in remarks(index):
            logger.info(remark)
    encoder = Encoder(
        order.indexes,
        build_template(config.template, tokens),
        tokens,
        image,
        config.max_length,
        ImageHandling(
            scaled_jpeg=config.jpeg == "scaled",
            augmenter=Augmenter(config.augment, seed) if config.augment is not None else None,
            shrinks=config.too_long in ("fewer_tiles", "shrink"),
        ),
        config.control_tokens,
    )
    encoder.control_tokens.without(config.control_tokens)
    return RowStream(
        order,
        Fetcher(encoder, config.num_workers),
        slots=slots,
        packing=config.packing,
        epochs=epochs,
        limits=Limits(config.bad_share_limit, config.too_long == "error", quarantine),
        read_ahead=ReadAhead(order, num_slots // len(slots)),
    )


def num_open_shards(index: ShardIndex, num_slots: int, window: int) -> int:
    """Tars that so many slots read at once: each goes through a window at a time, which lies in neighbouring tars."""
    if not index.shard_sizes:
        return 0
    mean_size = max(1, len(index) // len(index.shard_sizes))
    return min(len(index.shard_sizes), num_slots * (-(-window // mean_size) + 1))


def _check_lengths(config: DataConfig, text: TextSpec) -> None:
    if config.max_length > text.max_length:
        raise InputError(f"data.max_length is {config.max_length}, the language model takes {text.max_length} at most")
    if isinstance(config.packing, RowPacking) and config.packing.row_tokens < config.max_length:
        raise InputError(
            f"packing.row_tokens is {config.packing.row_tokens}, smaller than max_length {config.max_length}: a sample"
            " might fit no row"
        )


def _check_images(config: DataConfig, image: ImageSpec) -> None:
    is_anyres, is_native = image.fit.is_tiled, image.fit.grid is not None
    if config.jpeg == "scaled" and is_anyres:
        raise InputError(
            "data.jpeg is scaled, which would change the size that AnyRes chooses tiles by: set jpeg: exact"
        )
    if config.jpeg == "scaled" and is_native:
        raise InputError("data.jpeg is scaled, but at native resolution an image keeps its size: set jpeg: exact")
    if config.too_long == "fewer_tiles" and not is_anyres:
        instead = "shrink" if is_native else "skip or error"
        raise InputError(f"data.too_long is fewer_tiles, but image fit {image.fit.kind} has no canvas: set {instead}")
    if config.too_long == "shrink" and not is_native:
        instead = "fewer_tiles" if is_anyres else "skip or error"
        raise InputError(f"data.too_long is shrink, but image fit {image.fit.kind} has its sizes: set {instead}")
    if is_native and config.template.kind not in ("model", "pair"):
        raise InputError(
            f"data.template.kind: {config.template.kind} writes an image as {IMAGE_TOKEN}, which this model does not"
            " have: set kind: model"
        )


def build_order(config: DataConfig, indexes: Sequence[ShardIndex], seed: int, num_slots: int) -> SampleOrder:
    """The order of opened sources.

    Raises:
        InputError: an empty source, or weights for some sources only.
    """
    plan = build_plan(config, indexes, seed, num_slots)
    return SampleOrder(indexes, plan, OrderIdentity(order_fingerprint(config, indexes), seed, num_slots))


def build_plan(config: DataConfig, indexes: Sequence[ShardIndex], seed: int, num_slots: int) -> Plan:
    """The arithmetic of the order of one or several sources.

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
    """A digest of the samples, their mixture and the shuffle window: everything that a stream's state relies on."""
    facts = {
        "sources": [index.fingerprint for index in indexes],
        "weights": [source.weight for source in config.sources],
        "window": config.shuffle_window,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
