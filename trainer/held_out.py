"""A held-out set: the same samples in the same order each time it is measured.

Owns which samples, their encoding and the pictures that are answered to look at. Does not own what is measured on them
(`trainer.validation`). The order depends on the data alone, never on a run's seed, so that runs compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_pipeline.build import build_plan
from data_pipeline.config import DataConfig
from data_pipeline.encode import Encoder
from data_pipeline.fetch import Fetcher, Result
from data_pipeline.images import open_picture
from data_pipeline.record import Record, read_record
from data_pipeline.sample import Draw
from data_pipeline.source import open_index
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.build import Facts
from models.errors import InputError
from models.spec import IMAGE_TOKEN

ORDER_SEED = 0
READ_AHEAD = 4
"""Samples that are asked for ahead, for each worker."""


@dataclass(frozen=True)
class Example:
    """A picture, what is asked about it, and what the data say is the answer."""

    key: str
    picture: Image.Image
    question: str
    reference: str


class HeldOut:
    """The first `num_samples` of a data set's samples in a fixed random order; the augmentation of training is off.

    Raises InputError where a source is missing or empty, or the template and the tokenizer do not fit.
    """

    def __init__(self, config: DataConfig, facts: Facts, num_samples: int) -> None:
        tokens = Tokens.of(facts.tokenizer)
        self.indexes = [open_index(source) for source in config.sources]
        total = max(1, sum(len(index) for index in self.indexes))
        self._plan = build_plan(
            config.model_copy(update={"shuffle_window": total}), self.indexes, ORDER_SEED, num_slots=1
        )
        self.num_samples = min(num_samples, self._plan.slot_length(0))
        self.encoder = Encoder(
            self.indexes,
            self._plan,
            template=build_template(config.template, tokens),
            tokens=tokens,
            image=facts.image,
            max_length=config.max_length,
        )
        self.too_long_is_error = config.too_long == "error"
        self._fetcher = Fetcher(self.encoder, config.num_workers)
        self._ahead = READ_AHEAD * config.num_workers

    def encoded(self, places: Sequence[int]) -> Iterator[Result]:
        """The samples at `places` of the order, encoded as in training; the workers stay until `close`."""
        draws = [Draw(0, place) for place in places]
        for number, draw in enumerate(draws):
            for later in draws[number : number + self._ahead]:
                self._fetcher.prefetch(later)
            yield self._fetcher.result(draw)

    def forget(self) -> None:
        """Drop what was asked for ahead."""
        self._fetcher.forget()

    def close(self) -> None:
        """End the workers."""
        self._fetcher.close()

    def examples(self, count: int) -> list[Example]:
        """The first `count` usable samples with one picture, unprocessed."""
        found: list[Example] = []
        for place in range(self.num_samples):
            if len(found) == count:
                break
            source, sample = self._plan.locate(0, place)
            index = self.indexes[source]
            try:
                record = read_record(index.read(sample))
                if len(record.pictures) == 1:
                    found.append(_example(index.key_of(sample), record))
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
    return Example(key, open_picture(record.pictures[0]), question, reference)


def live_processor(model: Any, facts: Facts, held_out: HeldOut) -> tuple[Any, Any]:
    """The processor and the generation config that a bundle of this stage would have: prompts as in serving.

    Raises InputError where the model has no such processor.
    """
    from data_pipeline.templates import stop_id
    from models.export import generation_config, processor

    template, tokens = held_out.encoder.template, held_out.encoder.tokens
    return processor(model, facts, template.jinja()), generation_config(facts, stop_id(template, tokens))
