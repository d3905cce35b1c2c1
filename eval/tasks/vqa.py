"""Visual question answering: questions and ten human answers each, in VQA v2's format.

Owns: the prompt, the run, the figures. Does not own the accuracy (`eval.vqa`) or the files (`eval.splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import vqa
from eval.bootstrap import mean_interval
from eval.pictures import find_pictures, shuffle_pictures
from eval.splits import read_questions
from eval.tasks.config import VqaConfig
from eval.tasks.result import Answerer, TaskResult, answer_all, decoding_facts


class VqaTask:
    """Reads and checks the split at once; raises InputError where a file, an annotation or a picture is missing."""

    metric_names = ("vqa_accuracy",)

    def __init__(self, config: VqaConfig) -> None:
        self.config = config
        self.name = config.name or ("vqa_shuffled" if config.shuffle_pictures else "vqa")
        self._split = read_questions(config.questions, config.annotations)
        self._samples = self._split.samples[: config.limit]
        self._pictures = find_pictures(config.images, [(each.image_id, each.file_name) for each in self._samples])
        self._shown = shuffle_pictures(self._pictures, config.seed) if config.shuffle_pictures else self._pictures

    @property
    def num_samples(self) -> int:
        """How many questions are asked."""
        return len(self._samples)

    def run(self, predictor: Answerer, batch_size: int) -> TaskResult:
        """Ask every question once, greedily. Accuracies are in per cent."""
        return self.score(self.ask(predictor, batch_size, range(self.num_samples)))

    def ask(self, predictor: Answerer, batch_size: int, places: range, *, progress: bool = True) -> list[str]:
        """The answers to some of the questions."""
        return answer_all(
            predictor,
            [self._shown[place] for place in places],
            [self._samples[place].question + self.config.prompt_suffix for place in places],
            max_new_tokens=self.config.max_new_tokens,
            batch_size=batch_size,
            label=self.name if progress else None,
        )

    def score(self, answers: Sequence[str]) -> TaskResult:
        """The accuracy of an answer to every question."""
        config = self.config
        keys = [str(each.question_id) for each in self._samples]
        items = {key: each.item for key, each in zip(keys, self._samples, strict=True)}
        score = vqa.score(items, dict(zip(keys, answers, strict=True)), config.normalisation)
        percents = [100 * accuracy for accuracy in score.per_item]
        return TaskResult(
            task="vqa",
            name=self.name,
            metrics={"vqa_accuracy": score.accuracy},
            intervals={"vqa_accuracy": mean_interval(percents, clusters=self._pictures, seed=config.seed)},
            facts=self._facts(),
            shuffled=config.shuffle_pictures,
            samples=self._outputs(answers, score.per_item),
            details={
                "by_answer_type": score.by_answer_type,
                "by_question_type": score.by_question_type,
                "num_unused_annotations": self._split.num_unused_annotations,
            },
        )

    def _facts(self) -> dict[str, Any]:
        config = self.config
        return {
            "task": "vqa",
            "prompt": "{question}" + config.prompt_suffix,
            "decoding": decoding_facts(config.max_new_tokens),
            "normalisation": config.normalisation,
            "split": dict(self._split.digests),
            "num_samples": len(self._samples),
        }

    def _outputs(self, answers: Sequence[str], accuracies: Sequence[float]) -> list[dict[str, Any]]:
        rows = zip(self._samples, self._pictures, self._shown, answers, accuracies, strict=True)
        return [
            {
                "question_id": each.question_id,
                "picture": str(picture),
                "shown": str(shown),
                "question": each.question,
                "question_type": each.item.question_type,
                "answer": answer,
                "human_answers": list(each.item.human_answers),
                "accuracy": accuracy,
            }
            for each, picture, shown, answer, accuracy in rows
        ]
