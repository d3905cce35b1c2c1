"""The training part of a recipe: what a stage tunes, how far it runs, and how the engine is set up.

Values only. What they do stands beside the same names in `trainer.tuning`, `trainer.schedule`, `trainer.objectives`
and `trainer.engine`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipeline.config import DataConfig
from eval.tasks.config import TaskConfig
from models.spec import Config

Reader = Literal["language", "projector"]


class Frozen(Config):
    """The part stays as it was."""

    kind: Literal["frozen"] = "frozen"


class Full(Config):
    """Every weight of the part learns, in fp32. Norms and biases have no weight decay.

    `learning_rates` gives modules inside the part a rate of their own, by their dotted name: {"queries": 1e-3}. Modules
    named in `frozen` stay as they are.
    """

    kind: Literal["full"] = "full"
    learning_rate: PositiveFloat
    learning_rates: dict[str, PositiveFloat] = Field(default_factory=dict)
    frozen: Annotated[tuple[str, ...], Field(strict=False)] = ()
    weight_decay: float = 0.0


class Lora(Config):
    """Low-rank adapters (peft) on the linear layers named in `targets`, or on all but the output head.

    `dora` learns each output's magnitude beside the direction that the adapter turns (Liu et al. 2024).
    """

    kind: Literal["lora"] = "lora"
    learning_rate: PositiveFloat
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    dora: bool = False
    targets: Literal["all_linear"] | tuple[str, ...] = "all_linear"
    weight_decay: float = 0.0


Tuning = Annotated[Frozen | Full, Field(discriminator="kind")]
LanguageTuning = Annotated[Frozen | Full | Lora, Field(discriminator="kind")]


class TuningPlan(Config):
    """What learns, part by part."""

    vision: Tuning = Frozen()
    projector: Tuning = Frozen()
    language: LanguageTuning = Frozen()
    future: Tuning = Frozen()


class Duration(Config):
    """How long a stage runs: `count` optimizer steps, samples, text and image tokens, or epochs."""

    unit: Literal["steps", "samples", "tokens", "epochs"]
    count: PositiveInt

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


class AdamW(Config):
    """AdamW as in Loshchilov and Hutter 2019; learning rates and weight decay stand with the tuned parts."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = 1.0


class BatchConfig(Config):
    """`global_rows` rows make one optimizer step, over all ranks; a rank computes at most `micro_rows` at once."""

    global_rows: PositiveInt
    micro_rows: PositiveInt


class EngineConfig(Config):
    """`zero` names a file of ds_configs/ (without .json); `precision` is computed in, over fp32 trainable weights.

    fp16 has a loss scale of its own accord. A language model born in bf16 may leave fp16's range, so that pair is
    refused unless `force_fp16`.

    `activation_checkpointing` is how many decoder layers keep only their input and are computed again in the backward,
    evenly spread; `true` is all, `false` none. `compile` compiles the decoder layers with torch.compile: minutes at the
    start for faster steps.
    """

    zero: Literal["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"] = "zero2"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    force_fp16: bool = False
    activation_checkpointing: bool | NonNegativeInt = False
    compile: bool = False


class NextToken(Config):
    """Predict each supervised token from what stands before it."""

    kind: Literal["next_token"] = "next_token"
    reader: ClassVar[Reader] = "language"
    """Which part of the model reads the text, and so whose tokenizer the data go through; likewise below."""


class MultiToken(Config):
    """Predict each supervised token, and with the heads of `model.future` those behind it.

    The loss is that of the next token and `weight` times the sum of the heads': 1 as in Gloeckle et al. 2024, 0.3 and
    0.1 as in DeepSeek-V3.
    """

    kind: Literal["multi_token"] = "multi_token"
    weight: PositiveFloat = 1.0
    reader: ClassVar[Reader] = "language"


class ImageText(Config):
    """Bring pictures and their texts together: contrast (ITC), matching (ITM), captioning (ITG), as in BLIP-2.

    Negatives come from the whole global batch, whatever the number of GPUs; so a rank must take its rows at once
    (`batch.micro_rows`), and accumulation is refused. `label_smoothing` is for ITC and ITG.
    """

    kind: Literal["image_text"] = "image_text"
    losses: Annotated[tuple[Literal["itc", "itm", "itg"], ...], Field(strict=False, min_length=1)] = ("itc",)
    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    reader: ClassVar[Reader] = "projector"


Objective = Annotated[NextToken | MultiToken | ImageText, Field(discriminator="kind")]


class CheckpointConfig(Config):
    """A checkpoint every `every_steps` optimizer steps and one at the end; the newest `keep` stay, and the best one.

    The best is told by `validation.metric`; `finish_with` says which one the next stage and the merge start from.
    """

    every_steps: PositiveInt = 500
    keep: PositiveInt = 2
    finish_with: Literal["last", "best"] = "last"


class SpikeGuard(Config):
    """When a loss counts as a spike, and how often a run may go back for one.

    A spike lies more than `deviations` robust deviations (1.4826 x the median absolute deviation) and more than `rise`
    nats above the median of the last `window` losses, of which there must be at least half a window.
    """

    window: int = Field(default=64, ge=8)
    deviations: PositiveFloat = 12.0
    rise: PositiveFloat = 1.0
    max_rollbacks: int = Field(default=3, ge=0)


class GuardConfig(Config):
    """What a run does about numbers that are not finite, losses that leap, and ranks that stop answering."""

    max_skips: PositiveInt = 5
    """So many steps without an update in a row count as a spike."""
    spike: SpikeGuard = SpikeGuard()
    rank_timeout_s: PositiveFloat = 900.0
    """A rank that has not moved for so long ends the run; it must cover the slowest step, save and start."""


class EarlyStopping(Config):
    """Stop when `validation.metric` has not been better than its best for `patience` validations in a row."""

    patience: PositiveInt


class Validation(Config):
    """What is measured during training, every `every_steps` optimizer steps and at the end.

    The loss is taken on `num_samples` held-out samples, the same and in the same order each time; `generate` pictures
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
    """By which checkpoints are compared: `validation/loss`, `validation/token_accuracy`, `validation/TASK/METRIC`."""
    early_stopping: EarlyStopping | None = None

    @property
    def lower_is_better(self) -> bool:
        """Losses should fall; every other metric should rise."""
        return self.metric.endswith(("/loss", "/loss_shuffled"))


class WandbConfig(Config):
    """Weights & Biases, beside the JSONL log that is always written."""

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
    """One stage: what it starts from, what learns on which data, for how long, on which engine."""

    init: str | None = None
    """The stage whose finished weights it starts from; none: the pretrained parts and a new projector."""
    objective: Objective = NextToken()
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
            raise ValueError("tune: every part is frozen, so nothing would be learnt")
        if self.checkpoint.finish_with == "best" and self.validation is None:
            raise ValueError("checkpoint.finish_with is best, which a validation must tell: add one, or take last")
        return self
