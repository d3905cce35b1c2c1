"""Captioning: one prompt for every picture, compared with its reference captions.

Owns: the run and the figures. Does not own the metrics (`eval.caption_metrics`) or the files (`eval.splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.bootstrap import mean_interval
from eval.caption_metrics import METRICS, CaptionScores, score
from eval.pictures import find_pictures, shuffle_pictures
from eval.splits import read_captions
from eval.tasks.config import CaptionConfig
from eval.tasks.result import Answerer, TaskResult, answer_all, decoding_facts


class CaptionTask:
    """Reads and checks the split at once; raises InputError where a file or a picture is missing."""

    metric_names = METRICS

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.name = config.name or ("caption_shuffled" if config.shuffle_pictures else "caption")
        self._split = read_captions(config.captions)
        self._samples = self._split.samples[: config.limit]
        self._pictures = find_pictures(config.images, [(each.image_id, each.file_name) for each in self._samples])
        self._shown = shuffle_pictures(self._pictures, config.seed) if config.shuffle_pictures else self._pictures

    @property
    def num_samples(self) -> int:
        """How many pictures are captioned."""
        return len(self._samples)

    def run(self, predictor: Answerer, batch_size: int) -> TaskResult:
        """Caption every picture once, greedily. Scores are on coco-caption's scale.

        Intervals are of the metrics that are means over images; CIDEr's document frequencies stay as they are.
        """
        return self.score(self.ask(predictor, batch_size, range(self.num_samples)))

    def ask(self, predictor: Answerer, batch_size: int, places: range, *, progress: bool = True) -> list[str]:
        """The captions of some of the pictures."""
        return answer_all(
            predictor,
            [self._shown[place] for place in places],
            [self.config.prompt] * len(places),
            max_new_tokens=self.config.max_new_tokens,
            batch_size=batch_size,
            label=self.name if progress else None,
        )

    def score(self, answers: Sequence[str]) -> TaskResult:
        """The scores of a caption of every picture."""
        config = self.config
        keys = [str(each.image_id) for each in self._samples]
        references = {key: each.captions for key, each in zip(keys, self._samples, strict=True)}
        scores = score(references, dict(zip(keys, answers, strict=True)), with_meteor=config.meteor)
        return TaskResult(
            task="caption",
            name=self.name,
            metrics=scores.metrics,
            intervals={name: mean_interval(values, seed=config.seed) for name, values in scores.per_image.items()},
            facts=self._facts(scores),
            shuffled=config.shuffle_pictures,
            samples=self._outputs(answers, scores),
            details={
                "tokenizer": scores.tokenizer,
                "tokenizer_reason": scores.tokenizer_reason,
                "unavailable": scores.unavailable,
            },
        )

    def _facts(self, scores: CaptionScores) -> dict[str, Any]:
        return {
            "task": "caption",
            "prompt": self.config.prompt,
            "decoding": decoding_facts(self.config.max_new_tokens),
            "normalisation": scores.tokenizer,
            "split": dict(self._split.digests),
            "num_samples": len(self._samples),
        }

    def _outputs(self, answers: Sequence[str], scores: CaptionScores) -> list[dict[str, Any]]:
        rows = zip(self._samples, self._pictures, self._shown, answers, strict=True)
        return [
            {
                "image_id": each.image_id,
                "picture": str(picture),
                "shown": str(shown),
                "answer": answer,
                "references": list(each.captions),
                **{name: values[place] for name, values in scores.per_image.items()},
            }
            for place, (each, picture, shown, answer) in enumerate(rows)
        ]
