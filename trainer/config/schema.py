"""The training part of a recipe: what a stage tunes, how far it runs, and how the engine is set up.

Values only. They are used under the same names in `trainer.engine.tuning`, `trainer.schedule`,
`trainer.engine.engine`. Objectives are in `trainer.config.objective`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data_pipeline.config import DataConfig
from eval.tasks.config import TaskConfig
from models.spec import Config
from trainer.config.objective import OBJECTIVES, Objective
from trainer.config.shipped import shipped
from trainer.config.tuning import Frozen, TuningPlan

DS_CONFIGS = shipped("ds_configs")
"""DeepSpeed's settings, a file for each value of `engine.zero`."""


class Duration(Config):
    """How long a stage runs: `count` optimizer steps, samples, text and image tokens, or epochs."""

    unit: Literal["steps", "samples", "tokens", "epochs"]
    count: Annotated[int, Field(gt=0, le=10**15)]

    @classmethod
    def steps(cls, count: int) -> Duration:
        """`count` optimizer steps."""
        return cls(unit="steps", count=count)

    @classmethod
    def samples(cls, count: int) -> Duration:
        """`count` samples."""
        return cls(unit="samples", count=count)

    @classmethod
    def tokens(cls, count: int) -> Duration:
        """`count` tokens, image tokens included, padding not."""
        return cls(unit="tokens", count=count)

    @classmethod
    def epochs(cls, count: int) -> Duration:
        """`count` passes over the data, each sample once a pass."""
        return cls(unit="epochs", count=count)


class Schedule(Config):
    """The learning rate over a stage: a linear warmup over the first share `warmup`, then `kind` down to `floor`.

    `warmup` is a share of the duration; `warmup_steps` gives it in optimizer steps instead. `floor` is a share of the
    peak.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0.0, lt=1.0)
    warmup_steps: int | None = Field(default=None, ge=0)
    floor: float = Field(default=0.0, ge=0.0, le=1.0)


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Config):
    """AdamW as in Loshchilov and Hutter 2019; learning rates and weight decay are set for each tuned part."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = 1.0


class BatchConfig(Config):
    """`global_rows` rows make one optimizer step, over all ranks; a rank computes at most `micro_rows` at once."""

    global_rows: Annotated[int, Field(gt=0, le=1_000_000)]
    micro_rows: Annotated[int, Field(gt=0, le=1_000_000)]

    def num_micro_batches(self, world_size: int) -> int:
        """How many micro-batches one rank computes for one step."""
        return math.ceil(self.rank_rows(world_size) / self.micro_rows)

    def rank_rows(self, world_size: int) -> int:
        """The most rows that one rank computes for one step."""
        return math.ceil(self.global_rows / world_size)

    def rows_at_once(self, world_size: int) -> int:
        """The most rows of one micro-batch: `micro_rows`, or all that a rank has."""
        return min(self.micro_rows, self.rank_rows(world_size))


class EngineConfig(Config):
    """`zero` names a file of ds_configs/ (without .json); `precision` is computed in, over fp32 trainable weights.

    fp16 always uses a loss scale. A language model trained in bf16 may exceed fp16's range, so that pair is
    refused unless `force_fp16`.

    `activation_checkpointing` is how many decoder layers keep only their input and are computed again in the backward,
    evenly spread; `true` is all, `false` none. `compile` compiles the decoder layers with torch.compile: minutes at the
    start for faster steps. `deterministic` gives the same bits in every run on GPUs of the same kind and number, with
    kernels that may be slower.
    """

    zero: Literal["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"] = "zero2"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    force_fp16: bool = False
    activation_checkpointing: bool | NonNegativeInt = False
    compile: bool = False
    deterministic: bool = False


class CheckpointConfig(Config):
    """A checkpoint every `every_steps` optimizer steps and one at the end; the newest `keep` stay, and the best one.

    The best is chosen by `validation.metric`; `finish_with` selects the one that the next stage and the merge start
    from.
    """

    every_steps: PositiveInt = 500
    keep: PositiveInt = 2
    finish_with: Literal["last", "best"] = "last"


class SpikeGuard(Config):
    """When a loss counts as a spike, and how often a run may roll back because of one.

    A spike lies more than `deviations` robust deviations (1.4826 x the median absolute deviation) and more than `rise`
    nats above the median of the last `window` losses, of which there must be at least half a window.
    """

    window: int = Field(default=64, ge=8)
    deviations: Annotated[float, Field(gt=0, le=1e9)] = 12.0
    rise: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    max_rollbacks: int = Field(default=3, ge=0)


class GuardConfig(Config):
    """Handling of non-finite values, loss spikes, and ranks that hang."""

    max_skips: PositiveInt = 5
    """So many steps without an update in a row count as a spike."""
    spike: SpikeGuard = SpikeGuard()
    rank_timeout_s: Annotated[float, Field(gt=0, le=2_592_000)] = 900.0
    """A rank without progress for this long ends the run; it must cover the slowest step, save and start."""


class EarlyStopping(Config):
    """Stop when `validation.metric` has not been better than its best for `patience` validations in a row."""

    patience: PositiveInt


class Validation(Config):
    """What is measured during training, every `every_steps` optimizer steps and at the end.

    The loss is taken on `num_samples` held-out samples, the same and in the same order each time; `generate` images
    of them are answered to look at; `tasks` are benchmarks as `eval.run` has them (caption metrics, VQA accuracy).
    """

    data: DataConfig
    every_steps: PositiveInt
    num_samples: PositiveInt = 500
    generate: int = Field(default=0, ge=0)
    max_new_tokens: PositiveInt = 64
    """Of an answer to look at; a task has its own."""
    tasks: tuple[TaskConfig, ...] = ()
    metric: str = "validation/loss"
    """Ranks checkpoints: `validation/loss`, `validation/token_accuracy`, `validation/TASK/METRIC`."""
    early_stopping: EarlyStopping | None = None

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a loss; every other metric should rise."""
        return is_loss(self.metric)


def is_loss(metric: str) -> bool:
    """Whether a metric of validation should fall."""
    return metric.endswith(("/loss", "/loss_shuffled"))


class WandbConfig(Config):
    """Weights & Biases, in addition to the JSONL log that is always written."""

    project: str
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackingConfig(Config):
    """Where numbers go besides RUN/STAGE/metrics.jsonl."""

    log_every_steps: PositiveInt = 10
    wandb: WandbConfig | None = None
    tensorboard: bool = False
    histograms_every_steps: PositiveInt | None = None
    """Histograms of weights and gradients, layer by layer, to RUN/STAGE/insight/histograms.jsonl and beyond."""
    token_table_every_steps: PositiveInt | None = None
    """A page of predicted against true tokens, RUN/STAGE/insight/tokens_step_NNNNNN.html."""


class StageConfig(Config):
    """One stage: what it starts from, what is trained on which data, for how long, on which engine."""

    init: str | None = None
    """The stage whose finished weights it starts from; none: the pretrained parts and a new projector."""
    objective: Objective = Field(default_factory=lambda: OBJECTIVES.decode({"kind": "next_token"}))
    tune: TuningPlan
    data: DataConfig
    duration: Duration
    batch: BatchConfig
    schedule: Schedule = Schedule()
    optimizer: AdamW = AdamW()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    validation: Validation | None = None

    @model_validator(mode="after")
    def _something_learns(self) -> StageConfig:
        parts = (self.tune.vision, self.tune.projector, self.tune.language, self.tune.future)
        if all(isinstance(part, Frozen) for part in parts):
            raise ValueError("tune: every part is frozen, so nothing would be trained")
        if self.checkpoint.finish_with == "best" and self.validation is None:
            raise ValueError("checkpoint.finish_with is best, which a validation must tell: add one, or take last")
        return self
