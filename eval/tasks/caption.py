"""Captioning: one prompt for every image, compared with its reference captions.

Owns: the run and the figures. Does not own the metrics (`eval.caption_metrics`) or the files (`eval.splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.bootstrap import mean_interval
from eval.caption_metrics import METRICS, CaptionScores, score
from eval.result import TaskResult
from eval.splits import read_captions
from eval.tasks.asked import AskedTask
from eval.tasks.config import CaptionConfig
from eval.tasks.result import decoding_facts


class CaptionTask(AskedTask):
    """Reads and checks the split at once; raises InputError where a file or an image is missing."""

    metric_names = METRICS

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self._split = read_captions(config.captions)
        self._samples = self._split.samples[: config.limit]
        self._images = self._find_images(config, ((each.image_id, each.file_name) for each in self._samples))

    def prompt_of(self, place: int) -> str:
        """The one prompt."""
        return self.config.prompt

    def score(self, answers: Sequence[str]) -> TaskResult:
        """The scores of a caption of every image."""
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
        rows = zip(self._samples, self._images, self._shown, answers, strict=True)
        return [
            {
                "image_id": each.image_id,
                "picture": str(image),
                "shown": str(shown),
                "answer": answer,
                "references": list(each.captions),
                **{name: values[place] for name, values in scores.per_image.items()},
            }
            for place, (each, image, shown, answer) in enumerate(rows)
        ]
