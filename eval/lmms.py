"""Bundles of every family as a model of lmms-eval: `--model sightline --model_args pretrained=BUNDLE`.

Found by lmms-eval through the entry point `lmms_eval.models` (0.7 and later); only lmms-eval imports this module. It
is a check of our figures by another program: the same questions, the same answers, sample by sample.

Owns: requests -> queries. Refused in one line: video, audio, and decoding that draws at random.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image

from data_pipeline.images import open_image, to_rgb
from eval.predictor import Decoding, Predictor, Query, Turn
from eval.workers import Worker
from models.common.errors import InputError

_DEFAULT_MAX_NEW_TOKENS = 128
_BATCH_SIZE = 16


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="sightline", chat_class_path="eval.lmms.SightlineModel")


class SightlineModel(lmms):
    """A bundle, answering as `eval.run` does. Rank and number of processes are those that the launcher says."""

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = _BATCH_SIZE, device: str = "auto", **others: Any
    ) -> None:
        super().__init__()
        unknown = sorted(name for name, value in others.items() if value is not None and name != "max_batch_size")
        if unknown:
            raise InputError(f"model_args: {', '.join(unknown)}: a bundle has pretrained, batch_size and device alone")
        worker = Worker.of(os.environ)
        self._rank, self._world_size = worker.rank, worker.count
        self.batch_size = int(batch_size)
        self._predictor = Predictor.open(pretrained, device=_device(device, worker))

    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer to each request, in their order; requests of one decoding are asked together."""
        decodings = [_decoding(request.args[2]) for request in requests]
        answers = [""] * len(requests)
        for decoding in dict.fromkeys(decodings):
            places = [place for place, each in enumerate(decodings) if each == decoding]
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                queries = [self._query(requests[place]) for place in batch]
                for place, answer in zip(batch, self._predictor.answer(queries, decoding), strict=True):
                    answers[place] = answer
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each target with its end token, and whether greedy decoding gives it."""
        queries, targets = [], []
        for request in requests:
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            targets.append(doc_to_target if isinstance(doc_to_target, str) else str(doc_to_target(doc)))
            queries.append(Query(tuple(map(_image, doc_to_visual(doc) or ())), (Turn("user", context),)))
        losses = self._predictor.loss(queries, targets, batch_size=self.batch_size)
        length = max((count for _, count in losses), default=1)
        greedy = self._predictor.answer(queries, Decoding(max_new_tokens=length), batch_size=self.batch_size)
        return [
            (-loss, answer.strip() == target.strip())
            for (loss, _), answer, target in zip(losses, greedy, targets, strict=True)
        ]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered; raises InputError."""
        raise InputError("tasks of several rounds are not offered by this model")

    def _query(self, request: Any) -> Query:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return query_of(doc_to_messages(self.task_dict[task][split][doc_id]))


def query_of(messages: Sequence[Mapping[str, Any]]) -> Query:
    """A chat of lmms-eval as a query.

    Raises:
        InputError: a video or a sound, a system's turn, or an image behind the first turn.
    """
    images: list[Image.Image] = []
    turns: list[Turn] = []
    for message in messages:
        parts = message["content"] if not isinstance(message["content"], str) else [_text(message["content"])]
        for part in parts:
            if part["type"] not in ("text", "image"):
                raise InputError(f"lmms-eval's task shows a {part['type']}, and a bundle sees images alone")
            if part["type"] == "image":
                if turns:
                    raise InputError(
                        "lmms-eval's task shows an image in a later turn; a bundle sees those of the first"
                    )
                images.append(_image(part["url"]))
        if message["role"] not in ("user", "assistant"):
            raise InputError(f"a turn of {message['role']}: a bundle's chat has user and assistant alone")
        turns.append(Turn(message["role"], "\n".join(part["text"] for part in parts if part["type"] == "text")))
    return Query(tuple(images), tuple(turns))


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _image(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, str | Path) and Path(source).is_file():
        return open_image(Path(source))
    raise InputError(f"lmms-eval's task shows {str(source)[:60]!r}, which is no image")


def _decoding(options: Mapping[str, Any]) -> Decoding:
    """Greedy or beams, with the strings that end an answer; raises InputError where it would draw at random."""
    temperature = options.get("temperature") or 0.0
    if options.get("do_sample") and temperature > 0:
        raise InputError(f"temperature {temperature}: an evaluation does not draw at random; take 0")
    until = options.get("until") or ()
    return Decoding(
        max_new_tokens=int(options.get("max_new_tokens") or _DEFAULT_MAX_NEW_TOKENS),
        num_beams=int(options.get("num_beams") or 1),
        stop=tuple(each for each in ([until] if isinstance(until, str) else until) if each),
    )


def _device(name: str, worker: Worker) -> str:
    import torch

    return worker.device(name, torch.cuda.device_count())
