"""Image gain: by how much a model's own picture lowers the loss of the right answer.

    gain = loss per token with another sample's picture - loss per token with the right one      (nats; 0 = blind)

Owns: that measure on held-out captions or answers. It needs no decoding, so it tells of models too small to write well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.bootstrap import ratio_interval
from eval.pictures import find_pictures, shuffle_pictures
from eval.splits import read_captions, read_questions
from eval.tasks.config import CaptionData, ImageGainConfig, QuestionData
from eval.tasks.result import Answerer, TaskResult, loss_all

_Losses = tuple[tuple[float, int], tuple[float, int]]


@dataclass(frozen=True)
class _Answered:
    """Samples as parallel lists: pictures, what is asked, the answer whose loss counts; and what they came from."""

    pictures: list[Path]
    prompts: list[str]
    answers: list[str]
    facts: dict[str, Any]


def _from_captions(data: CaptionData, limit: int | None) -> _Answered:
    """Every caption of every picture; `limit` counts pictures."""
    split = read_captions(data.captions)
    samples = split.samples[:limit]
    found = find_pictures(data.images, [(each.image_id, each.file_name) for each in samples])
    pictures = [picture for picture, each in zip(found, samples, strict=True) for _ in each.captions]
    answers = [caption for each in samples for caption in each.captions]
    facts = {"prompt": data.prompt, "split": dict(split.digests)}
    return _Answered(pictures, [data.prompt] * len(answers), answers, facts)


def _from_questions(data: QuestionData, limit: int | None) -> _Answered:
    """The most frequent human answer of every question; the first among equals."""
    split = read_questions(data.questions, data.annotations)
    samples = split.samples[:limit]
    pictures = find_pictures(data.images, [(each.image_id, each.file_name) for each in samples])
    prompts = [each.question + data.prompt_suffix for each in samples]
    answers = [Counter(each.item.human_answers).most_common(1)[0][0] for each in samples]
    facts = {"prompt": "{question}" + data.prompt_suffix, "split": dict(split.digests)}
    return _Answered(pictures, prompts, answers, facts)


class ImageGainTask:
    """Reads and checks the split at once; raises InputError where a file or a picture is missing."""

    metric_names = ("image_gain", "loss", "loss_shuffled")

    def __init__(self, config: ImageGainConfig) -> None:
        self.config = config
        self.name = config.name or "image_gain"
        data = config.data
        self._data = (
            _from_captions(data, config.limit) if isinstance(data, CaptionData) else _from_questions(data, config.limit)
        )
        self._shown = shuffle_pictures(self._data.pictures, config.seed)

    @property
    def num_samples(self) -> int:
        """How many answers' losses are taken, each twice."""
        return len(self._data.answers)

    def run(self, predictor: Answerer, batch_size: int) -> TaskResult:
        """Measure each answer's loss twice. Losses are nats per token over all tokens; pictures are resampled whole."""
        return self.score(self.ask(predictor, batch_size, range(self.num_samples)))

    def ask(self, predictor: Answerer, batch_size: int, places: range, *, progress: bool = True) -> list[_Losses]:
        """Of some answers: (summed loss, number of tokens) with the right picture and with the exchanged one."""
        prompts = [self._data.prompts[place] for place in places]
        answers = [self._data.answers[place] for place in places]
        losses = []
        for pictures, label in ((self._data.pictures, "right pictures"), (self._shown, "exchanged")):
            shown = [pictures[place] for place in places]
            name = f"{self.name}: {label}" if progress else None
            losses.append(loss_all(predictor, shown, prompts, answers, batch_size=batch_size, label=name))
        return list(zip(*losses, strict=True))

    def score(self, answers: Sequence[_Losses]) -> TaskResult:
        """The gain, from both losses of every answer."""
        data = self._data
        right, shuffled = [losses for losses, _ in answers], [losses for _, losses in answers]
        gains: dict[Path, float] = {}
        tokens: dict[Path, int] = {}
        for picture, (right_loss, num_tokens), (other_loss, _) in zip(data.pictures, right, shuffled, strict=True):
            gains[picture] = gains.get(picture, 0.0) + other_loss - right_loss
            tokens[picture] = tokens.get(picture, 0) + num_tokens
        interval = ratio_interval(list(gains.values()), list(tokens.values()), seed=self.config.seed)
        num_tokens = sum(tokens.values())
        return TaskResult(
            task="image_gain",
            name=self.name,
            metrics={
                "image_gain": interval.estimate,
                "loss": sum(loss for loss, _ in right) / num_tokens,
                "loss_shuffled": sum(loss for loss, _ in shuffled) / num_tokens,
            },
            intervals={"image_gain": interval},
            facts={"task": "image_gain", **data.facts, "num_samples": len(data.answers), "seed": self.config.seed},
            shuffled=False,
            samples=self._outputs(right, shuffled),
            details={"num_tokens": num_tokens},
        )

    def _outputs(self, right: list[tuple[float, int]], shuffled: list[tuple[float, int]]) -> list[dict[str, Any]]:
        data = self._data
        rows = zip(data.pictures, self._shown, data.prompts, data.answers, right, shuffled, strict=True)
        return [
            {
                "picture": str(picture),
                "shown": str(shown),
                "prompt": prompt,
                "answer": answer,
                "loss": right_loss,
                "loss_shuffled": other_loss,
                "num_tokens": num_tokens,
            }
            for picture, shown, prompt, answer, (right_loss, num_tokens), (other_loss, _) in rows
        ]
