"""Visual question answering: questions and ten human answers each, in VQA v2's format.

Owns: the prompt, the run, the figures. Does not own the accuracy (`eval.vqa`) or the files (`eval.splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import vqa
from eval.bootstrap import mean_interval
from eval.result import TaskResult
from eval.splits import read_questions
from eval.tasks.asked import AskedTask
from eval.tasks.config import VqaConfig
from eval.tasks.result import decoding_facts


class VqaTask(AskedTask):
    """Reads and checks the split at once; raises InputError where a file, an annotation or an image is missing."""

    metric_names = ("vqa_accuracy",)

    def __init__(self, config: VqaConfig) -> None:
        self.config = config
        self._split = read_questions(config.questions, config.annotations)
        self._samples = self._split.samples[: config.limit]
        for each in self._samples:
            vqa.check_human_answers(each.item.human_answers, f"{config.annotations}: question {each.question_id}")
        self._images = self._find_images(config, ((each.image_id, each.file_name) for each in self._samples))

    def prompt_of(self, place: int) -> str:
        """The question and the suffix."""
        return self._samples[place].question + self.config.prompt_suffix

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
            intervals={"vqa_accuracy": mean_interval(percents, clusters=self._images, seed=config.seed)},
            facts=self._facts(),
            shuffled=config.shuffle_pictures,
            samples=self._outputs(answers, score.per_item),
            details={
                "by_answer_type": score.by_answer_type,
                "by_question_type": score.by_question_type,
                "num_unused_annotations": self._split.num_unused_annotations,
                **self._hidden_by_case(items, answers, score.accuracy),
            },
        )

    def _hidden_by_case(self, items: dict[str, vqa.VqaItem], answers: Sequence[str], accuracy: float) -> dict[str, Any]:
        """What `evalai` gives where every question has one right answer, which `official` compares letter by letter."""
        is_one_answer = all(len(set(item.human_answers)) == 1 for item in items.values())
        if self.config.normalisation != "official" or not is_one_answer:
            return {}
        other = vqa.score(items, dict(zip(items, answers, strict=True)), "evalai").accuracy
        if other <= accuracy:
            return {}
        note = (
            f"every question has one right answer, which `official` compares letter by letter ('Yes' is not 'yes'): "
            f"{accuracy:.2f} %; with normalisation evalai it is {other:.2f} %"
        )
        return {"note": note}

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
        rows = zip(self._samples, self._images, self._shown, answers, accuracies, strict=True)
        return [
            {
                "question_id": each.question_id,
                "picture": str(image),
                "shown": str(shown),
                "question": each.question,
                "question_type": each.item.question_type,
                "answer": answer,
                "human_answers": list(each.item.human_answers),
                "accuracy": accuracy,
            }
            for each, image, shown, answer, accuracy in rows
        ]
