"""Tasks that ask one question about each image and score the texts: who is asked what, how, and in which batches.

Owns: the images, those that are shown, and the asking. Does not own what is asked or how it is scored: a task derives
from `AskedTask` and says both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.entries import ImageId
from eval.images import Shown, digests_of, shown_images
from eval.result import TaskResult
from eval.tasks.config import AskedConfig
from eval.tasks.result import Answerer, answer_all, decoding_facts, digest_of


class AskedTask(ABC):
    """The half of `eval.tasks.result.Task` that is the same for all of them.

    A constructor reads its files and calls `_find_images` with the (image id, file name or None) of each sample, which
    raises InputError where an image is missing.
    """

    name: str
    _shown: Sequence[Shown]
    _max_new_tokens: int

    def _find_images(self, config: AskedConfig, wanted: Iterable[tuple[ImageId, str | None]]) -> list[Path]:
        """The samples' own images; what they are shown is kept."""
        images, shown = shown_images(
            config.images,
            list(wanted),
            seed=config.seed if config.shuffle_pictures else None,
        )
        self.name = config.name or (f"{config.kind}_shuffled" if config.shuffle_pictures else config.kind)
        self._shown, self._max_new_tokens = shown, config.max_new_tokens
        return images

    @property
    def pictures(self) -> Sequence[Shown]:
        """What each sample is shown."""
        return self._shown

    @abstractmethod
    def prompt_of(self, place: int) -> str:
        """What is asked about the sample at `place`."""

    @abstractmethod
    def score(self, answers: Sequence[str]) -> TaskResult:
        """See `Task`: the result of an answer to every sample."""

    scores_texts = True
    compares_vectors = False

    def asked(self) -> dict[str, Any]:
        """See `Task`."""
        return {
            "prompts": digest_of(self.prompt_of(place) for place in range(self.num_samples)),
            "pictures": digest_of(digests_of(self._shown)),
            "decoding": decoding_facts(self._max_new_tokens),
            "num_samples": self.num_samples,
        }

    def answers_in(self, samples: Sequence[Mapping[str, Any]]) -> list[str]:
        """See `Task`: the samples' answers."""
        return [sample["answer"] for sample in samples]

    @property
    def num_samples(self) -> int:
        """How many samples are asked about."""
        return len(self._shown)

    def run(self, predictor: Answerer, batch_size: int) -> TaskResult:
        """See `Task`: ask about every sample once, greedily, then score."""
        return self.score(self.ask(predictor, batch_size, range(self.num_samples)))

    def ask(self, predictor: Answerer, batch_size: int, places: range, *, progress: bool = True) -> list[str]:
        """See `Task`: one answer to each of the samples at `places`."""
        return answer_all(
            predictor,
            [self._shown[place] for place in places],
            [self.prompt_of(place) for place in places],
            max_new_tokens=self._max_new_tokens,
            batch_size=batch_size,
            label=self.name if progress else None,
        )
