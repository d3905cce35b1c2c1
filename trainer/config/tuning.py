"""What a stage tunes, part by part: a part is frozen, learns in full, or learns low-rank adapters. Values only.

What they do to a model is in `trainer.engine.tuning`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from models.spec import Config, Name

Rate = Annotated[float, Field(gt=0, le=100)]
"""A peak learning rate."""
WeightDecay = Annotated[float, Field(ge=0, le=1)]


class Frozen(Config):
    """The part is not trained."""

    kind: Literal["frozen"] = "frozen"


class Full(Config):
    """Every weight of the part is trained, in fp32. Norms and biases have no weight decay.

    `learning_rates` gives modules inside the part a rate of their own, by their dotted name: {"queries": 1e-3}. Modules
    named in `frozen` are not trained.
    """

    kind: Literal["full"] = "full"
    learning_rate: Rate
    learning_rates: dict[Name, Rate] = Field(default_factory=dict)
    frozen: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    weight_decay: WeightDecay = 0.0


class Lora(Config):
    """Low-rank adapters (peft) on the linear layers named in `targets`, or on all but the output head.

    Of the vision encoder and the projector as of the language model; each part has its own rate, rank and targets.
    `dora` also trains each output's magnitude, separately from its direction (Liu et al. 2024).
    """

    kind: Literal["lora"] = "lora"
    learning_rate: Rate
    rank: Annotated[int, Field(gt=0, le=65_536)]
    alpha: Annotated[float, Field(gt=0, le=1e6)]
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    dora: bool = False
    adapter: str | None = None
    """The directory of a peft adapter that the stage's adapters start from; rank, alpha, dora and targets are its."""
    targets: Literal["all_linear"] | Annotated[tuple[Name, ...], Field(min_length=1)] = "all_linear"
    weight_decay: WeightDecay = 0.0


Tuning = Annotated[Frozen | Full | Lora, Field(discriminator="kind")]
HeadsTuning = Annotated[Frozen | Full, Field(discriminator="kind")]


class TuningPlan(Config):
    """How each part is tuned."""

    vision: Tuning = Frozen()
    projector: Tuning = Frozen()
    language: Tuning = Frozen()
    future: HeadsTuning = Frozen()
