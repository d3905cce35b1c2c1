"""Image gain: by how much a model's own image lowers the loss of the right answer.

    gain = loss per token with another sample's image - loss per token with the right one      (nats; 0 = blind)

Owns: that measure on held-out captions or answers. It needs no decoding, so it also measures models that are too small
    to generate good text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.bootstrap import Interval, ratio_interval
from eval.images import digests_of, shown_images
from eval.result import TaskResult
from eval.splits import read_captions, read_questions
from eval.tasks.config import CaptionData, ImageGainConfig, QuestionData
from eval.tasks.result import Answerer, digest_of, loss_all

NOT_LOOKED_AT = (
    "the image is not looked at: the interval of what it gains holds 0. Try more epochs, fewer image tokens, an earlier"
    " model.vision.feature_layer, a token before the image (data.template.opening); where little was learnt,"
    ' `sightline preflight --numerics` says what bf16 carries of the first gradients (docs/recipes.md, "Few data")'
)

_Losses = tuple[tuple[float, int], tuple[float, int]]


@dataclass(frozen=True)
class _Answered:
    """Samples as parallel lists: images, those exchanged, what is asked, the answer whose loss counts; their source."""

    images: list[Path]
    shown: list[Path]
    prompts: list[str]
    answers: list[str]
    facts: dict[str, Any]


def _from_captions(data: CaptionData, config: ImageGainConfig) -> _Answered:
    """Every caption of every image; `limit` counts images."""
    split = read_captions(data.captions)
    samples = split.samples[: config.limit]
    found = shown_images(data.images, [(each.image_id, each.file_name) for each in samples], seed=config.seed)
    images, shown = ([image for image, each in zip(one, samples, strict=True) for _ in each.captions] for one in found)
    answers = [caption for each in samples for caption in each.captions]
    facts = {"prompt": data.prompt, "split": dict(split.digests)}
    return _Answered(images, shown, [data.prompt] * len(answers), answers, facts)


def _from_questions(data: QuestionData, config: ImageGainConfig) -> _Answered:
    """The most frequent human answer of every question; the first of equally frequent ones."""
    split = read_questions(data.questions, data.annotations)
    samples = split.samples[: config.limit]
    images, shown = shown_images(data.images, [(each.image_id, each.file_name) for each in samples], seed=config.seed)
    prompts = [each.question + data.prompt_suffix for each in samples]
    answers = [Counter(each.item.human_answers).most_common(1)[0][0] for each in samples]
    facts = {"prompt": "{question}" + data.prompt_suffix, "split": dict(split.digests)}
    return _Answered(images, shown, prompts, answers, facts)


class ImageGainTask:
    """Reads and checks the split at once; raises InputError where a file or an image is missing."""

    metric_names = ("image_gain", "loss", "loss_shuffled")

    def __init__(self, config: ImageGainConfig) -> None:
        self.config = config
        self.name = config.name or "image_gain"
        data = config.data
        self._data = _from_captions(data, config) if isinstance(data, CaptionData) else _from_questions(data, config)

    @property
    def num_samples(self) -> int:
        """The number of answers; the loss of each is measured twice."""
        return len(self._data.answers)

    scores_texts = False
    compares_vectors = False

    def asked(self) -> dict[str, Any]:
        """See `Task`."""
        data = self._data
        return {
            "prompts": digest_of(data.prompts),
            "answers": digest_of(data.answers),
            "pictures": digest_of(digests_of(data.images)),
            "shown": digest_of(digests_of(data.shown)),
        }

    def answers_in(self, samples: Sequence[Mapping[str, Any]]) -> list[_Losses]:
        """See `Task`: both losses of each answer."""
        return [((each["loss"], each["num_tokens"]), (each["loss_shuffled"], each["num_tokens"])) for each in samples]

    def run(self, predictor: Answerer, batch_size: int) -> TaskResult:
        """Measure each answer's loss twice. Losses are nats per token over all tokens; images are resampled whole."""
        return self.score(self.ask(predictor, batch_size, range(self.num_samples)))

    def ask(self, predictor: Answerer, batch_size: int, places: range, *, progress: bool = True) -> list[_Losses]:
        """Of some answers: (summed loss, number of tokens) with the right image and with the exchanged one."""
        prompts = [self._data.prompts[place] for place in places]
        answers = [self._data.answers[place] for place in places]
        losses = []
        for images, label in ((self._data.images, "right images"), (self._data.shown, "exchanged")):
            shown = [images[place] for place in places]
            name = f"{self.name}: {label}" if progress else None
            losses.append(loss_all(predictor, shown, prompts, answers, batch_size=batch_size, label=name))
        return list(zip(*losses, strict=True))

    def score(self, answers: Sequence[_Losses]) -> TaskResult:
        """The gain, from both losses of every answer."""
        data = self._data
        right, shuffled = [losses for losses, _ in answers], [losses for _, losses in answers]
        gains: dict[Path, float] = {}
        tokens: dict[Path, int] = {}
        for image, (right_loss, num_tokens), (other_loss, _) in zip(data.images, right, shuffled, strict=True):
            gains[image] = gains.get(image, 0.0) + other_loss - right_loss
            tokens[image] = tokens.get(image, 0) + num_tokens
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
            details={"num_tokens": num_tokens, **_note(interval)},
        )

    def _outputs(self, right: list[tuple[float, int]], shuffled: list[tuple[float, int]]) -> list[dict[str, Any]]:
        data = self._data
        rows = zip(data.images, self._data.shown, data.prompts, data.answers, right, shuffled, strict=True)
        return [
            {
                "picture": str(image),
                "shown": str(shown),
                "prompt": prompt,
                "answer": answer,
                "loss": right_loss,
                "loss_shuffled": other_loss,
                "num_tokens": num_tokens,
            }
            for image, shown, prompt, answer, (right_loss, num_tokens), (other_loss, _) in rows
        ]


def _note(gain: Interval) -> dict[str, str]:
    """What to try where the gain cannot be told from none."""
    return {"note": NOT_LOOKED_AT} if gain.low <= 0 else {}
