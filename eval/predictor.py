"""A model that answers questions about pictures: one class behind evaluation, the demo and `sightline.load`.

    Query --encode--> Prompt --collate (left padding)--> prefill --> token, token, ... --AnswerText--> str

Owns: opening a bundle, batching, and the loss of given answers. Does not own the prompt (eval.prompts), the token loop
(eval.generation), the choice of tokens and their text (eval.decoding) or scores.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from data_pipeline.images import open_picture
from eval.decoding import AnswerStream, AnswerText, Decoding
from eval.generation import ChatMemory, continue_chat, evaluating, write_beams, write_tokens
from eval.prompts import Prompt, Query, Turn, collate, encode, encode_answered
from models.bundle import Manifest, read_manifest
from models.bundle import verify as verify_bundle
from models.errors import InputError

__all__ = ["AnswerStream", "Decoding", "Predictor", "Query", "Turn"]

GREEDY = Decoding()


class Predictor:
    """Answers queries with a model and its processor, from a bundle (`Predictor.open`) or live in a training run.

    `model` takes what a Hugging Face image-text-to-text model takes (`forward` with a cache; `generate` for beams);
    `processor` is its Hugging Face processor. Answers do not depend on what else is in a batch. `num_remembered` chats
    are kept as keys and values, so that `stream` reads only a chat's new turn; 0 where the weights may change.
    """

    def __init__(self, model: Any, processor: Any, *, device: str | torch.device, num_remembered: int = 0) -> None:
        self.model, self.processor, self.device = model, processor, torch.device(device)
        self.manifest: Manifest | None = None
        """The bundle's manifest, where the model came from one."""
        tokenizer = processor.tokenizer
        self._end_ids = _end_ids(model, tokenizer)
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._end_ids)
        self._memory = ChatMemory(num_remembered, processor.image_token_id) if num_remembered else None
        self._max_length = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))
        self._pixel_dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    @classmethod
    def open(cls, path: str | PathLike[str], *, device: str = "auto", verify: bool = True) -> Predictor:
        """Open the bundle at `path` on `device` ("auto" is the first GPU, else the CPU).

        `verify` compares each file with its digest in the manifest first. Raises InputError, naming the file, when
        the folder is no bundle or is damaged.
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
        predictor = cls(model.eval(), processor, device=place, num_remembered=2)
        predictor.manifest = manifest
        return predictor

    def answer(self, queries: Sequence[Query], decoding: Decoding = GREEDY, *, batch_size: int = 16) -> list[str]:
        """Answer each query, `batch_size` at a time. Pictures, lengths and numbers of pictures may differ."""
        answers: list[str] = []
        for start in range(0, len(queries), batch_size):
            prompts = [encode(self.processor, query) for query in queries[start : start + batch_size]]
            texts = self._texts(prompts, decoding)
            pieces = [[""] for _ in texts]
            for new in self._steps(prompts, texts, decoding):
                for row, piece in zip(pieces, new, strict=True):
                    row.append(piece)
            answers += ["".join(row) for row in pieces]
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
        elif memory is not None:
            tokens = continue_chat(self.model, prompts[0], inputs, decoding, memory)
        else:
            tokens = write_tokens(self.model, inputs, decoding)
        with closing(tokens):
            for token_ids in tokens:
                yield [text.push(token_id) for text, token_id in zip(texts, token_ids, strict=True)]
                if all(text.done for text in texts) or (cancel is not None and cancel.is_set()):
                    break
        yield [text.finish() for text in texts]

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
        return ImageOps.exif_transpose(picture).convert("RGB")
    return open_picture(picture if isinstance(picture, bytes) else Path(picture))
