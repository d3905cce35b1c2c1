"""Yes/no questions, such as POPE's: does the model say what is there, and does it say yes too often?

Owns: the prompt, the run, the figures. Does not own the rule (`eval.yes_no`) or the files (`eval.splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.bootstrap import mean_interval
from eval.result import TaskResult
from eval.splits import read_yes_no
from eval.tasks.asked import AskedTask
from eval.tasks.config import YesNoConfig
from eval.tasks.result import decoding_facts
from eval.yes_no import FIGURES, YesNoScore, is_unclear, is_yes


class YesNoTask(AskedTask):
    """Reads and checks the split at once; raises InputError where a file, a label or an image is missing."""

    metric_names = FIGURES

    def __init__(self, config: YesNoConfig) -> None:
        self.config = config
        self._split = read_yes_no(config.questions, config.annotations)
        self._samples = self._split.samples[: config.limit]
        self._images = self._find_images(config, ((each.image_id, each.file_name) for each in self._samples))

    def prompt_of(self, place: int) -> str:
        """The question and the suffix."""
        return self._samples[place].question + self.config.prompt_suffix

    def score(self, answers: Sequence[str]) -> TaskResult:
        """The figures of an answer to every question."""
        config, labels = self.config, [each.label for each in self._samples]
        said = [is_yes(answer) for answer in answers]
        figures = YesNoScore.of(said, labels).figures()
        right = [float(is_right) for is_right in map(bool.__eq__, said, labels)]
        shares = {"accuracy": right, "yes_share": [float(value) for value in said]}
        return TaskResult(
            task="yes_no",
            name=self.name,
            metrics=figures,
            intervals={
                name: mean_interval(values, clusters=self._images, seed=config.seed) for name, values in shares.items()
            },
            facts=self._facts(),
            shuffled=config.shuffle_pictures,
            samples=self._outputs(answers, said),
            details={
                "by_category": self._by_category(said),
                "num_unclear": sum(map(is_unclear, answers)),
                "unavailable": {name: "nothing to divide by" for name, value in figures.items() if value is None},
            },
        )

    def _by_category(self, said: Sequence[bool]) -> dict[str, dict[str, float | None]]:
        """The figures of each category that the file names; POPE's are adversarial, popular and random."""
        categories = sorted({each.category for each in self._samples if each.category is not None})
        found = {}
        for category in categories:
            pairs = [
                (answer, each.label)
                for answer, each in zip(said, self._samples, strict=True)
                if each.category == category
            ]
            found[category] = YesNoScore.of([answer for answer, _ in pairs], [label for _, label in pairs]).figures()
        return found

    def _facts(self) -> dict[str, Any]:
        config = self.config
        return {
            "task": "yes_no",
            "prompt": "{question}" + config.prompt_suffix,
            "decoding": decoding_facts(config.max_new_tokens),
            "normalisation": "pope",
            "split": dict(self._split.digests),
            "num_samples": len(self._samples),
        }

    def _outputs(self, answers: Sequence[str], said: Sequence[bool]) -> list[dict[str, Any]]:
        rows = zip(self._samples, self._images, self._shown, answers, said, strict=True)
        return [
            {
                "question_id": each.question_id,
                "picture": str(image),
                "shown": str(shown),
                "question": each.question,
                "category": each.category,
                "answer": answer,
                "counts_as": "yes" if is_said else "no",
                "label": "yes" if each.label else "no",
                "is_unclear": is_unclear(answer),
            }
            for each, image, shown, answer, is_said in rows
        ]
