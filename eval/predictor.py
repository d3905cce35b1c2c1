"""A model that answers questions about images: the class used by evaluation, the demo and `sightline.load`.

    Query --encode--> Prompt --PromptReader--> Batch of rows --> token, token, ... --AnswerText--> str

Owns: opening a bundle, batches of a fixed set of queries, and the loss of given answers. Does not own the prompt
(eval.prompts), the rows of a batch (eval.batch), the choice of tokens and their text (eval.decoding) or scores. Many
callers at once are `eval.engine`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from data_pipeline.images import open_image, to_rgb
from data_pipeline.record import Turn
from eval.answers import AnswerCache
from eval.batch import Batch, Row
from eval.decoding import AnswerStream, AnswerText, Decoding, end_ids_of
from eval.generation import evaluating, write_beams
from eval.kept_chats import KeptChats
from eval.kv_cache import DynamicKVCache, KVCache, is_fixable
from eval.lru_cache import LruCache
from eval.pixels import Pixels
from eval.prefill import PromptReader
from eval.prompts import Prompt, PromptTooLongError, encode, encode_answered
from eval.query import Query
from eval.speculative import Speculation, SpeculationGate, can_speculate, write_speculatively
from eval.static_cache import StaticCachePool, StaticKVCache
from models.bundle import Manifest, find_manifest
from models.common.errors import InputError
from models.published.family import check_family

__all__ = ["AnswerStream", "Decoding", "Predictor", "Query", "Turn"]

GREEDY = Decoding()

KEPT_BYTES = 1 << 28
"""Of projected features, and as much of keys and values of chats, that an open bundle keeps."""


class Predictor:
    """Answers queries with a model and its processor, from a bundle (`Predictor.open`) or live in a training run.

    `model` has the interface of a Hugging Face image-text-to-text model (`forward` with a cache; `generate` for beams);
    `processor` is its Hugging Face processor. Answers do not depend on what else is in a batch.

    Args:
        kept_bytes: projected features of images, and as many bytes of keys and values of chats, that are kept, so that
            with `stream` another question about an image skips the vision encoder, and of a chat only the new turn is
            read.
        is_fixed: decode single answers with keys and values of a fixed size, on a GPU by a CUDA graph.
        num_answers: answers that are cached for the same query with the same decoding, seed included.

    Use all three only where the weights do not change.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        device: str | torch.device,
        kept_bytes: int = 0,
        is_fixed: bool = False,
        num_answers: int = 0,
    ) -> None:
        self.model, self.processor, self.device = model, processor, torch.device(device)
        self.manifest: Manifest | None = None
        """The bundle's manifest, where the model came from a bundle."""
        self.speculation = Speculation() if getattr(model, "future", None) is not None else None
        """Statistics of speculative decoding, where the model has heads for future tokens."""
        tokenizer = processor.tokenizer
        self._end_ids = end_ids_of(model, tokenizer)
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._end_ids)
        self._max_length = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))
        self.is_fixed = is_fixed
        self._pool = StaticCachePool(model, self.device) if is_fixed else None
        self._answers: AnswerCache[str] = AnswerCache(num_answers)
        self.reader = self.make_reader(0, 0)
        """Reads prompts whole: what `answer` says in bf16 must not depend on what was asked before."""
        self._chat_reader = self.make_reader(kept_bytes, kept_bytes)

    @classmethod
    def open(
        cls, path: str | PathLike[str], *, device: str = "auto", verify: bool = True, num_answers: int = 0
    ) -> Predictor:
        """Open the bundle at `path` on `device` ("auto" is the first GPU, else the CPU).

        A published LLaVA, LLaVA-NeXT or LLaVA-OneVision without our manifest opens too, and a line says so.

        `verify` compares each file with its digest in the manifest first; `num_answers` answers are cached.
        Raises InputError, naming the file, when the folder is no bundle or is damaged.
        """
        from models.opening import open_model, open_processor

        folder, place = Path(path), _device(device)
        manifest = find_manifest(folder, compare_files=verify)
        if manifest is None:
            check_family(folder)
        processor, model = open_processor(folder), open_model(folder, place)
        is_fixed = place.type == "cuda" and is_fixable(model)
        predictor = cls(
            model, processor, device=place, kept_bytes=KEPT_BYTES, is_fixed=is_fixed, num_answers=num_answers
        )
        predictor.manifest = manifest
        return predictor

    def answer(self, queries: Sequence[Query], decoding: Decoding = GREEDY, *, batch_size: int = 16) -> list[str]:
        """Answer each query, `batch_size` at a time. Images, lengths and numbers of images may differ."""
        answers: list[str] = []
        for start in range(0, len(queries), batch_size):
            prompts = [encode(self.processor, query) for query in queries[start : start + batch_size]]
            known = [self._answers.find(prompt, decoding) for prompt in prompts]
            new = [prompt for prompt, answer in zip(prompts, known, strict=True) if answer is None]
            written = iter(self._write(new, decoding) if new else ())
            answers += [next(written) if answer is None else answer for answer in known]
        return answers

    def _write(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        rows = [self.row(prompt, decoding) for prompt in prompts]
        pieces = [[""] for _ in rows]
        for new in self._steps(rows, self.reader):
            for place, piece in new:
                pieces[place].append(piece)
        answers = ["".join(row) for row in pieces]
        for prompt, answer in zip(prompts, answers, strict=True):
            self._answers.keep(prompt, decoding, answer)
        return answers

    def stream(
        self, query: Query, decoding: Decoding = GREEDY, *, cancel: threading.Event | None = None
    ) -> AnswerStream:
        """Answer one query piece by piece; the pieces joined are `answer`'s result. `cancel` ends it after a token.

        With beams the answer comes as one piece, since the best one is known only at the end.
        """
        row = self.row(self.prompt(query), decoding, cancel=cancel)
        pieces = (piece for new in self._steps([row], self._chat_reader) for _, piece in new)
        return AnswerStream(pieces, lambda: len(row.text.ids))

    def loss(
        self, queries: Sequence[Query], answers: Sequence[str], *, batch_size: int = 16
    ) -> list[tuple[float, int]]:
        """Teacher-forced loss of each answer: its summed negative log-likelihood in nats, and its number of tokens.

        The end token counts, as in training. Divide sums by sums for a mean over answers.
        """
        losses: list[tuple[float, int]] = []
        pairs = list(zip(queries, answers, strict=True))
        for start in range(0, len(pairs), batch_size):
            encoded = [
                encode_answered(self.processor, *pair, self._end_ids) for pair in pairs[start : start + batch_size]
            ]
            losses += self._batch_loss([prompt for prompt, _ in encoded], [count for _, count in encoded])
        return losses

    def chat(self, image: str | PathLike[str] | bytes | Image.Image, question: str, **decoding: Any) -> str:
        """Answer one question about one image: a path, the bytes of a file, or a PIL image."""
        query = Query((_rgb(image),), (Turn("user", question),))
        return self.answer([query], Decoding(**decoding))[0]

    def prompt(self, query: Query, pixels: Pixels | None = None) -> Prompt:
        """A query as ids and pixels; from any thread, and without the model. Raises InputError as `encode`."""
        return encode(self.processor, query, pixels)

    def row(self, prompt: Prompt, decoding: Decoding, *, cancel: threading.Event | None = None) -> Row:
        """An answer that is about to be written.

        Raises:
            InputError: the prompt leaves no room for an answer.
        """
        room = self._max_length - len(prompt.ids)
        if room < 1:
            raise PromptTooLongError(
                f"the chat takes {len(prompt.ids)} tokens and the model reads {self._max_length}: shorten it"
            )
        max_tokens = min(room, decoding.max_new_tokens)
        text = AnswerText(self.processor.tokenizer, end_ids=self._end_ids, max_tokens=max_tokens, stop=decoding.stop)
        generator = torch.Generator(self.device).manual_seed(decoding.seed)
        return Row(prompt, decoding, text, generator, cancel or threading.Event())

    def make_reader(self, feature_bytes: int, chat_bytes: int) -> PromptReader:
        """What reads prompts for a batch, with memories of so many bytes; 0 is without."""
        # LLaVA-OneVision's features of an image depend on how many images a prompt has; those of Qwen-VL have levels.
        config = self.model.config
        is_by_image = getattr(config, "model_type", "") != "llava_onevision" and hasattr(config, "vision_feature_layer")
        has_features = feature_bytes > 0 and is_by_image and hasattr(self.model, "get_image_features")
        return PromptReader(
            self.model,
            self.device,
            pad_id=self._pad_id,
            features=LruCache(feature_bytes) if has_features else None,
            chats=KeptChats(chat_bytes, self.processor.image_token_id) if chat_bytes > 0 else None,
        )

    def _steps(self, rows: Sequence[Row], reader: PromptReader) -> Iterator[list[tuple[int, str]]]:
        """Yield the new text of rows with their places, token by token, until every row has ended."""
        decoding = rows[0].decoding
        if decoding.num_beams > 1:
            yield from self.search(rows)
            return
        if self.speculation is not None and can_speculate(decoding, len(rows)):
            gate = SpeculationGate(clock=None) if decoding.speculate == "always" else SpeculationGate()
            tokens = write_speculatively(
                self.model, self.reader.collate([rows[0].prompt], side="left"), self.speculation, gate
            )
            yield from _texts(rows, tokens)
        else:
            yield from self._together(rows, reader)

    def search(self, rows: Sequence[Row]) -> Iterator[list[tuple[int, str]]]:
        """Yield the text of the best answers by beam search, token by token, once they are found.

        All rows have the first one's decoding, and its `cancel` ends the search.
        """
        tokens = write_beams(
            self.model,
            self.reader.collate([row.prompt for row in rows], side="left"),
            rows[0].decoding,
            end_ids=sorted(self._end_ids),
            pad_id=self._pad_id,
            cancel=rows[0].cancel,
        )
        yield from _texts(rows, tokens)

    def _together(self, rows: Sequence[Row], reader: PromptReader) -> Iterator[list[tuple[int, str]]]:
        """Start all rows at once, and go on with those that have not ended."""
        places = {id(row): place for place, row in enumerate(rows)}
        cache = self._make_cache(rows)
        batch = Batch(reader, cache)
        try:
            with evaluating(self.model):
                pieces = batch.join(rows)
                while pieces:
                    yield [(places[id(row)], piece) for row, piece in pieces]
                    ended = batch.leave()
                    yield [(places[id(row)], row.text.finish()) for row in ended]
                    pieces = batch.step() if batch.rows else []
        except GeneratorExit:  # nobody wants the rest
            for row in batch.rows:
                row.cancel.set()
            batch.leave()
            raise
        finally:
            self._give_back(cache)

    def _make_cache(self, rows: Sequence[Row]) -> KVCache:
        """An empty cache: for one row a static one from the pool, where there is a pool."""
        if self._pool is None or len(rows) > 1:
            return DynamicKVCache(self.model)
        return self._pool.take(rows[0].need)

    def _give_back(self, cache: KVCache) -> None:
        if self._pool is not None and isinstance(cache, StaticKVCache):
            self._pool.give(cache)

    @torch.no_grad()
    def _batch_loss(self, prompts: Sequence[Prompt], num_targets: Sequence[int]) -> list[tuple[float, int]]:
        inputs = self.reader.collate(prompts, side="right")
        with evaluating(self.model):
            logits_BLV = self.model(**inputs, use_cache=False).logits
        losses = []
        for row, (prompt, count) in enumerate(zip(prompts, num_targets, strict=True)):
            end = len(prompt.ids)
            targets = inputs["input_ids"][row, end - count : end]
            logits = logits_BLV[row, end - count - 1 : end - 1].float()
            losses.append((F.cross_entropy(logits, targets, reduction="sum").item(), count))
        return losses

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._end_ids

    def inputs_of(self, query: Query) -> dict[str, torch.Tensor]:
        """The model's inputs for one query, on its device."""
        return self.reader.collate([encode(self.processor, query)], side="left")


def _texts(rows: Sequence[Row], tokens: Generator[list[int]]) -> Iterator[list[tuple[int, str]]]:
    """The new text of rows with their places, for one token of each after another, until all have ended."""
    with closing(tokens):
        for token_ids in tokens:
            yield [(place, rows[place].text.push(token_id)) for place, token_id in enumerate(token_ids)]
            if all(row.has_ended for row in rows):
                break
    yield [(place, row.text.finish()) for place, row in enumerate(rows)]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{name!r} is no device: take auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, and this machine has no CUDA device: take auto or cpu")
    return device


def _rgb(image: str | PathLike[str] | bytes | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    return open_image(image if isinstance(image, bytes) else Path(image))
