"""Retrieval: the captions of each image and the image of each caption among all of a set, by an encoder of both.

Owns the run and the figures. Does not own the rule (`eval.recall`) or the encoders (`eval.dual_encoder`, in training
`trainer.validation.pair_encoder`). An answer is float32 in base64: first the images' vectors, one or several each, then
the captions'.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.bootstrap import mean_interval
from eval.images import digests_of, shown_images
from eval.result import TaskResult
from eval.splits import read_captions
from eval.tasks.config import RetrievalConfig
from eval.tasks.result import digest_of
from models.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from eval.dual_encoder import DualEncoder

_RANKS = (1, 5, 10)


class RetrievalTask:
    """Reads and checks the files at once; raises InputError where one, or an image, is missing."""

    metric_names = tuple(
        f"{direction}/recall_at_{rank}" for direction in ("image_to_text", "text_to_image") for rank in _RANKS
    )
    scores_texts = False
    compares_vectors = True

    def __init__(self, config: RetrievalConfig) -> None:
        self.config = config
        self.name = config.name or "retrieval"
        self._split = read_captions(config.captions)
        self._samples = self._split.samples[: config.limit]
        self._images, _ = shown_images(
            config.images, [(each.image_id, each.file_name) for each in self._samples], seed=None
        )
        self._texts = [(place, text) for place, each in enumerate(self._samples) for text in each.captions]

    @property
    def num_samples(self) -> int:
        """Images and captions."""
        return len(self._images) + len(self._texts)

    def asked(self) -> dict[str, Any]:
        """See `Task`."""
        prompts = digest_of(self._prompt(text) for _, text in self._texts)
        return {"prompts": prompts, "pictures": digest_of(digests_of(self._images)), "task": "retrieval"}

    def _prompt(self, text: str) -> str:
        return self.config.prompt.replace("{caption}", text)

    def answers_in(self, samples: Sequence[Mapping[str, Any]]) -> list[str]:
        """See `Task`; samples hold no vectors, so they are made again."""
        return [sample["vector"] for sample in samples]

    def run(self, predictor: Any, batch_size: int) -> TaskResult:
        """See `Task`."""
        return self.score(self.ask(predictor, batch_size, range(self.num_samples)))

    def ask(self, predictor: Any, batch_size: int, places: range, *, progress: bool = True) -> list[str]:
        """The vectors of the images and captions at `places`.

        Raises:
            InputError: the model is no dual encoder.
        """
        del progress
        if not hasattr(predictor, "texts"):
            raise InputError(
                "retrieval compares vectors: give a dual encoder such as CLIP or SigLIP, in its own folder"
            )
        found: list[str] = []
        for start in range(places.start, places.stop, batch_size):
            found += self._vectors(predictor, range(start, min(start + batch_size, places.stop)))
        return found

    def _vectors(self, encoder: DualEncoder, places: range) -> list[str]:
        count = len(self._images)
        images: list[Path] = [self._images[place] for place in places if place < count]
        texts = [self._prompt(self._texts[place - count][1]) for place in places if place >= count]
        vectors = [encoder.images(images)] if images else []
        vectors += [encoder.texts(texts)] if texts else []
        return [base64.b64encode(row.numpy().tobytes()).decode() for part in vectors for row in part]

    def score(self, answers: Sequence[str]) -> TaskResult:
        """Recalls as shares; intervals resample whole images with their captions."""
        from eval.recall import all_hits, recalls

        scores_IT, is_pair_IT = self._matrices(answers)
        found = all_hits(scores_IT, is_pair_IT)
        of_text = [place for place, _ in self._texts]
        intervals = {
            name: mean_interval(
                each.float().tolist(),
                clusters=of_text if name.startswith("text") else None,
                seed=self.config.seed,
            )
            for name, each in found.items()
        }
        ties = {ties: recalls(scores_IT, is_pair_IT, ties=ties) for ties in ("for", "topk")}
        return TaskResult(
            task="retrieval",
            name=self.name,
            metrics={name: float(each.float().mean()) for name, each in found.items()},
            intervals=intervals,
            facts={
                "task": "retrieval",
                "prompt": self.config.prompt,
                "split": dict(self._split.digests),
                "num_samples": self.num_samples,
            },
            shuffled=False,
            samples=self._outputs({name: each.tolist() for name, each in found.items()}),
            details={"num_images": len(self._images), "num_captions": len(self._texts), "ties": ties},
        )

    def _matrices(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Cosines [I, T], and which caption is of which image."""
        import torch

        from eval.recall import cosines

        vectors = [np.frombuffer(base64.b64decode(answer), dtype=np.float32) for answer in answers]
        count = len(self._images)
        texts_TE = torch.tensor(np.stack(vectors[count:]))
        images_IVE = torch.tensor(np.stack(vectors[:count])).view(count, -1, texts_TE.shape[1])
        is_pair_IT = torch.zeros(count, len(texts_TE), dtype=torch.bool)
        is_pair_IT[[place for place, _ in self._texts], torch.arange(len(texts_TE))] = True
        return cosines(images_IVE, texts_TE), is_pair_IT

    def _outputs(self, found: Mapping[str, Sequence[bool]]) -> list[dict[str, Any]]:
        images = [
            {"image_id": each.image_id, "picture": str(path), "recall_at_1": found["image_to_text/recall_at_1"][place]}
            for place, (each, path) in enumerate(zip(self._samples, self._images, strict=True))
        ]
        texts = [
            {
                "image_id": self._samples[place].image_id,
                "caption": text,
                "recall_at_1": found["text_to_image/recall_at_1"][number],
            }
            for number, (place, text) in enumerate(self._texts)
        ]
        return [*images, *texts]
