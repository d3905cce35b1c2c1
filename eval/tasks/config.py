"""What can be measured: one typed value per task, tagged by `kind`.

Owns the values only, so that a mistake shows before a model is opened: loads without torch. `eval.tasks` maps each to
its class. Relative paths are relative to the directory that the command runs in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from eval.vqa import Normalisation
from models.spec import Config

Positive = Annotated[int, Field(gt=0)]


class SampleConfig(Config):
    """What every task has: a name in the results, how many samples (the first ones; all by default), and its seed."""

    name: str | None = None
    """Must differ within a suite; by default the kind, with `_shuffled` where pictures are."""
    limit: Positive | None = None
    seed: int = 0
    """Of the exchange of pictures and of the bootstrap."""


class VqaConfig(SampleConfig):
    """Questions with human answers, in VQA v2's two files."""

    kind: Literal["vqa"] = "vqa"
    questions: Path
    annotations: Path
    images: Path
    prompt_suffix: str = ""
    """Put after each question. VQA v2 with LLaVA: "\\nAnswer the question using a single word or phrase."."""
    normalisation: Normalisation = "official"
    max_new_tokens: Positive = 16
    shuffle_pictures: bool = False


class CaptionConfig(SampleConfig):
    """One prompt for every picture, compared with its captions."""

    kind: Literal["caption"] = "caption"
    captions: Path
    images: Path
    prompt: str
    meteor: bool = True
    """METEOR costs about 10 s of start-up."""
    max_new_tokens: Positive = 64
    shuffle_pictures: bool = False


class CaptionData(Config):
    """Reference captions as the answers whose loss is measured."""

    kind: Literal["captions"] = "captions"
    captions: Path
    images: Path
    prompt: str


class QuestionData(Config):
    """Each question's most frequent human answer as the answer whose loss is measured."""

    kind: Literal["questions"] = "questions"
    questions: Path
    annotations: Path
    images: Path
    prompt_suffix: str = ""


class ImageGainConfig(SampleConfig):
    """How much the pictures help: loss of the right answers with exchanged pictures, minus with their own."""

    kind: Literal["image_gain"] = "image_gain"
    data: Annotated[CaptionData | QuestionData, Field(discriminator="kind")]


TaskConfig = Annotated[VqaConfig | CaptionConfig | ImageGainConfig, Field(discriminator="kind")]
