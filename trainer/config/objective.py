"""The interface of an objective's configuration, and the table of kinds. Loads without torch.

A new objective is one file, with its configuration and its loss, and one line: in OBJECTIVES, or in another package an
entry point of the group `sightline.objectives` (see `models.kinds`). Most derive from `trainer.objectives.base`, which
has what the language model's objectives share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from models.config import ModelSource, Reader
from models.kinds import KindTable
from models.shapes import Counts, ModelShape, PartFlops
from models.spec import Config
from trainer.config.tuning import TuningPlan


class ObjectiveConfig(Config, ABC):
    """What a stage minimises, as a sum over the targets of a batch."""

    kind: str
    reader: ClassVar[Reader] = "language"
    """The part of the model that reads the text, whose tokenizer the data use."""
    compares_rows: ClassVar[bool] = False
    """Whether a row's loss depends on the other rows of the global batch, so a rank must compute its rows at once."""

    @abstractmethod
    def build(self) -> Callable[..., Any]:
        """The loss: (vlm, batch) -> LossSum, a `trainer.objectives.loss_sum.BatchLoss`."""

    def check_model(self, model: ModelSource) -> None:
        """Raise ValueError, with a message for the user, where the model lacks a part that this objective trains."""

    @abstractmethod
    def flops(self, shape: ModelShape, plan: TuningPlan, counts: Counts) -> dict[str, PartFlops]:
        """FLOPs that a forward and backward over `counts` need, by part of the model."""

    @abstractmethod
    def activation_bytes(
        self, shape: ModelShape, plan: TuningPlan, counts: Counts, *, element: int, num_recomputed: int
    ) -> dict[str, float]:
        """Bytes that autograd keeps from the forward to the backward over `counts`, by purpose.

        `element` is the bytes of a number in the forward, 4 or 2. `num_recomputed` decoder layers keep only their
        input, and are computed again in the backward.
        """


OBJECTIVES = KindTable(
    "sightline.objectives",
    ObjectiveConfig,  # type: ignore[type-abstract]
    {
        "next_token": "trainer.objectives.next_token:NextToken",
        "multi_token": "trainer.objectives.multi_token:MultiToken",
        "image_text": "trainer.objectives.image_text:ImageText",
    },
)

Objective = Annotated[ObjectiveConfig, OBJECTIVES]
