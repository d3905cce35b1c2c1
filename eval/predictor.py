"""A model that answers questions about pictures: one class behind evaluation, the demo and `sightline.load`.

    Query --encode--> Prompt --collate (left padding)--> prefill --> token, token, ... --AnswerText--> str

Owns: opening a bundle, batching, and the loss of given answers. Does not own the prompt (eval.prompts), the token loop
(eval.generation), the choice of tokens and their text (eval.decoding) or scores.
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

from data_pipeline.images import open_picture, to_rgb
from eval.answers import AnswerCache
from eval.decoding import AnswerStream, AnswerText, Decoding
from eval.generation import ChatMemory, continue_chat, evaluating, write_beams, write_tokens
from eval.prompts import Prompt, Query, Turn, collate, encode, encode_answered
from eval.readers import FixedReader, GrowingReader, Reader, ReaderPool, is_fixable
from eval.speculative import Speculation, Worth, can_speculate, write_speculatively
from models.bundle import Manifest, read_manifest
from models.bundle import verify as verify_bundle
from models.errors import InputError

__all__ = ["AnswerStream", "Decoding", "Predictor", "Query", "Turn"]

GREEDY = Decoding()


class Predictor:
    """Answers queries with a model and its processor, from a bundle (`Predictor.open`) or live in a training run.

    `model` takes what a Hugging Face image-text-to-text model takes (`forward` with a cache; `generate` for beams);
    `processor` is its Hugging Face processor. Answers do not depend on what else is in a batch.

    Args:
        num_remembered: chats that are kept as keys and values, so that `stream` reads only a chat's new turn.
        is_fixed: write single answers with keys and values of a fixed size, on a GPU by a CUDA graph.
        num_answers: answers that are kept and given again to the same query with the same decoding, seed included.

    All three only where the weights do not change.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        device: str | torch.device,
        num_remembered: int = 0,
        is_fixed: bool = False,
        num_answers: int = 0,
    ) -> None:
        self.model, self.processor, self.device = model, processor, torch.device(device)
        self.manifest: Manifest | None = None
        """The bundle's manifest, where the model came from one."""
        self.speculation = Speculation() if getattr(model, "future", None) is not None else None
        """What the model's heads for future tokens did so far, where it has some."""
        tokenizer = processor.tokenizer
        self._end_ids = _end_ids(model, tokenizer)
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._end_ids)
        self._max_length = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))
        self._pool = ReaderPool(model, self.device, self._max_length) if is_fixed else None
        self._memory = ChatMemory(num_remembered, processor.image_token_id, self._give_back) if num_remembered else None
        self._answers = AnswerCache(num_answers)
        self._pixel_dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    @classmethod
    def open(
        cls, path: str | PathLike[str], *, device: str = "auto", verify: bool = True, num_answers: int = 0
    ) -> Predictor:
        """Open the bundle at `path` on `device` ("auto" is the first GPU, else the CPU).

        `verify` compares each file with its digest in the manifest first; `num_answers` are kept and given again.
        Raises InputError, naming the file, when the folder is no bundle or is damaged.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        import models.registered  # noqa: F401 - makes our own class known

        folder, place = Path(path), _device(device)
        manifest = verify_bundle(folder) if verify else read_manifest(folder)
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype="auto", device_map={"": place}
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{folder} does not open as a bundle: {reason}; make it again with tools.merge") from error
        is_fixed = place.type == "cuda" and is_fixable(model)
        predictor = cls(
            model.eval(), processor, device=place, num_remembered=2, is_fixed=is_fixed, num_answers=num_answers
        )
        predictor.manifest = manifest
        return predictor

    def answer(self, queries: Sequence[Query], decoding: Decoding = GREEDY, *, batch_size: int = 16) -> list[str]:
        """Answer each query, `batch_size` at a time. Pictures, lengths and numbers of pictures may differ."""
        answers: list[str] = []
        for start in range(0, len(queries), batch_size):
            prompts = [encode(self.processor, query) for query in queries[start : start + batch_size]]
            known = [self._answers.find(prompt, decoding) for prompt in prompts]
            new = [prompt for prompt, answer in zip(prompts, known, strict=True) if answer is None]
            written = iter(self._write(new, decoding) if new else ())
            answers += [next(written) if answer is None else answer for answer in known]
        return answers

    def _write(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        texts = self._texts(prompts, decoding)
        pieces = [[""] for _ in texts]
        for new in self._steps(prompts, texts, decoding):
            for row, piece in zip(pieces, new, strict=True):
                row.append(piece)
        answers = ["".join(row) for row in pieces]
        for prompt, answer in zip(prompts, answers, strict=True):
            self._answers.keep(prompt, decoding, answer)
        return answers

    def stream(
        self, query: Query, decoding: Decoding = GREEDY, *, cancel: threading.Event | None = None
    ) -> AnswerStream:
        """Answer one query piece by piece; the pieces joined are what `answer` gives. `cancel` ends it after a token.

        Beams are known only when all are done, so their answer comes as one piece.
        """
        prompts = [encode(self.processor, query)]
        texts = self._texts(prompts, decoding)
        return AnswerStream(self._steps(prompts, texts, decoding, cancel=cancel, memory=self._memory), texts[0])

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

    def chat(self, picture: str | PathLike[str] | bytes | Image.Image, question: str, **decoding: Any) -> str:
        """Answer one question about one picture: a path, the bytes of a file, or a PIL image."""
        query = Query((_rgb(picture),), (Turn("user", question),))
        return self.answer([query], Decoding(**decoding))[0]

    def _texts(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[AnswerText]:
        texts = []
        for prompt in prompts:
            room = self._max_length - len(prompt.ids)
            if room < 1:
                raise InputError(
                    f"the chat takes {len(prompt.ids)} tokens and the model reads {self._max_length}: shorten it"
                )
            texts.append(
                AnswerText(
                    self.processor.tokenizer,
                    end_ids=self._end_ids,
                    max_tokens=min(room, decoding.max_new_tokens),
                    stop=decoding.stop,
                )
            )
        return texts

    def _steps(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[AnswerText],
        decoding: Decoding,
        *,
        cancel: threading.Event | None = None,
        memory: ChatMemory | None = None,
    ) -> Iterator[list[str]]:
        """Yield each row's new text, token by token, until every row is done."""
        inputs = self._collate(prompts, side="left")
        if decoding.num_beams > 1:
            ends = sorted(self._end_ids)
            tokens = write_beams(self.model, inputs, decoding, end_ids=ends, pad_id=self._pad_id)
        elif self.speculation is not None and can_speculate(decoding, len(prompts)):
            worth = Worth(clock=None) if decoding.speculate == "always" else Worth()
            tokens = write_speculatively(self.model, inputs, self.speculation, worth)
        elif memory is not None:
            tokens = continue_chat(
                self.model,
                prompts[0],
                inputs,
                decoding,
                memory=memory,
                make_reader=self._make_reader,
                num_positions=self._num_positions(prompts[0], decoding),
            )
        else:
            tokens = self._alone(prompts, inputs, decoding)
        with closing(tokens):
            for token_ids in tokens:
                yield [text.push(token_id) for text, token_id in zip(texts, token_ids, strict=True)]
                if all(text.done for text in texts) or (cancel is not None and cancel.is_set()):
                    break
        yield [text.finish() for text in texts]

    def _alone(
        self, prompts: Sequence[Prompt], inputs: dict[str, torch.Tensor], decoding: Decoding
    ) -> Generator[list[int]]:
        """Prompts that nothing is known of, and of which nothing stays."""
        if len(prompts) > 1:
            yield from write_tokens(self.model, inputs, decoding, GrowingReader(self.model))
            return
        reader = self._make_reader(self._num_positions(prompts[0], decoding))
        try:
            yield from write_tokens(self.model, inputs, decoding, reader)
        except GeneratorExit:
            self._give_back(reader)
            raise

    def _num_positions(self, prompt: Prompt, decoding: Decoding) -> int:
        return min(len(prompt.ids) + decoding.max_new_tokens, self._max_length)

    def _make_reader(self, num_positions: int) -> Reader:
        """A reader of one row."""
        return GrowingReader(self.model) if self._pool is None else self._pool.take(num_positions)

    def _give_back(self, reader: Reader) -> None:
        if self._pool is not None and isinstance(reader, FixedReader):
            self._pool.give(reader)

    @torch.no_grad()
    def _batch_loss(self, prompts: Sequence[Prompt], num_targets: Sequence[int]) -> list[tuple[float, int]]:
        inputs = self._collate(prompts, side="right")
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
        """What the model takes for one query, on its device."""
        return self._collate([encode(self.processor, query)], side="left")

    def _collate(self, prompts: Sequence[Prompt], *, side: Any) -> dict[str, torch.Tensor]:
        batch = collate(prompts, pad_id=self._pad_id, side=side, device=self.device)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(self._pixel_dtype)
        return batch


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    ids = frozenset([configured] if isinstance(configured, int) else configured or [])
    if not ids:
        raise InputError("neither the generation config nor the tokenizer names an end token: set eos_token_id")
    return ids


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


def _rgb(picture: str | PathLike[str] | bytes | Image.Image) -> Image.Image:
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    return open_picture(picture if isinstance(picture, bytes) else Path(picture))
