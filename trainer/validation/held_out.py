"""A held-out set: the same samples in the same order each time it is measured.

Owns the choice of samples, their encoding and the images that are answered. Does not own the metrics
(`trainer.validation.validator`). The order depends on the data alone, never on a run's seed, so that runs compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_pipeline.build import build_order
from data_pipeline.config import DataConfig
from data_pipeline.encode import Encoder
from data_pipeline.fetch import Fetcher, Result
from data_pipeline.images import open_image
from data_pipeline.index import ShardIndex
from data_pipeline.record import Record, read_record
from data_pipeline.sample_order import SampleOrder
from data_pipeline.source import open_index
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.build import ModelMetadata
from models.common.errors import InputError
from models.spec import IMAGE_TOKEN

ORDER_SEED = 0
READ_AHEAD = 4
"""Samples requested ahead of time, per worker."""


@dataclass(frozen=True)
class Example:
    """An image, its question, and the answer in the data."""

    key: str
    image: Image.Image
    question: str
    reference: str


class HeldOut:
    """The first `num_samples` of a data set's samples in a fixed random order; the augmentation of training is off."""

    def __init__(
        self, indexes: list[ShardIndex], order: SampleOrder, encoder: Encoder, num_samples: int, config: DataConfig
    ) -> None:
        self.indexes, self.encoder = indexes, encoder
        self.num_samples = min(num_samples, order.slot_length(0))
        self.too_long_is_error = config.too_long == "error"
        self.fingerprint = order.identity.fingerprint
        """Of the samples' content, wherever they lie."""
        self._order = order
        self._fetcher = Fetcher(encoder, config.num_workers)
        self._ahead = READ_AHEAD * config.num_workers

    @classmethod
    def open(cls, config: DataConfig, metadata: ModelMetadata, num_samples: int) -> HeldOut:
        """The held-out samples of a data configuration, at most `num_samples`.

        Raises:
            InputError: a source is missing or empty, or the template and the tokenizer do not fit.
        """
        tokens = Tokens.of(metadata.tokenizer, metadata.text.image_token)
        indexes = [open_index(source) for source in config.sources]
        total = max(1, sum(len(index) for index in indexes))
        order = build_order(config.model_copy(update={"shuffle_window": total}), indexes, ORDER_SEED, num_slots=1)
        encoder = Encoder(
            indexes,
            template=build_template(config.template, tokens),
            tokens=tokens,
            image=metadata.image,
            max_length=config.max_length,
            kept_control_tokens=config.control_tokens,
        )
        return cls(indexes, order, encoder, num_samples, config)

    def encoded(self, places: Sequence[int]) -> Iterator[Result]:
        """The samples at `places` of the order, encoded as in training; the workers are kept until `close`."""
        refs = [self._order.resolve(0, place) for place in places]
        for number, ref in enumerate(refs):
            for later in refs[number : number + self._ahead]:
                self._fetcher.prefetch(later)
            yield self._fetcher.result(ref)

    def forget(self) -> None:
        """Cancel the requests made ahead of time."""
        self._fetcher.forget()

    def close(self) -> None:
        """End the workers."""
        self._fetcher.close()

    def examples(self, count: int) -> list[Example]:
        """The first `count` usable samples with one image, unprocessed."""
        found: list[Example] = []
        for place in range(self.num_samples):
            if len(found) == count:
                break
            ref = self._order.resolve(0, place)
            try:
                record = read_record(self.indexes[ref.source].read(ref.sample))
                if len(record.images) == 1:
                    found.append(_example(ref.key, record))
            except InputError:
                continue  # the loss names and counts it
        return found


def _example(key: str, record: Record) -> Example:
    question, reference = ("", "")
    for turn in record.turns:
        if turn.role == "user" and not reference:
            question = turn.text.replace(IMAGE_TOKEN, "").strip()
        if turn.role == "assistant" and not reference:
            reference = turn.text
    return Example(key, open_image(record.images[0]), question, reference)


def live_processor(model: Any, facts: ModelMetadata, held_out: HeldOut) -> tuple[Any, Any]:
    """The processor and the generation config that a bundle of this stage would have: prompts as in serving.

    Raises InputError where the model has no such processor.
    """
    from data_pipeline.templates import stop_id
    from models.export import generation_config, processor

    template, tokens = held_out.encoder.template, held_out.encoder.tokens
    return processor(model, facts, template.jinja()), generation_config(facts, stop_id(template, tokens))
