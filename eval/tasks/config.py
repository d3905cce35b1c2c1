"""What can be measured: one typed value per task, tagged by `kind`.

Owns the values only, so that mistakes are found before a model is opened: loads without torch. `eval.tasks` maps each
to its class. Relative paths are relative to the directory that the command runs in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from eval.vqa import Normalisation
from models.spec import Config

Positive = Annotated[int, Field(gt=0)]


class SampleConfig(Config):
    """Fields of every task: its name in the results, how many samples (the first ones; all by default), its seed."""

    name: str | None = None
    """Must differ within a suite; by default the kind, with `_shuffled` where images are."""
    limit: Positive | None = None
    seed: int = 0
    """The seed of the exchange of images and of the bootstrap."""


class AskedConfig(SampleConfig):
    """Fields of every task that asks for a text about each image."""

    kind: str
    images: Path
    max_new_tokens: Positive = 16
    shuffle_pictures: bool = False


class VqaConfig(AskedConfig):
    """Questions with human answers, in VQA v2's two files."""

    kind: Literal["vqa"] = "vqa"
    questions: Path
    annotations: Path
    prompt_suffix: str = ""
    """Appended to each question. VQA v2 with LLaVA: "\\nAnswer the question using a single word or phrase."."""
    normalisation: Normalisation = "official"


class YesNoConfig(AskedConfig):
    """Questions whose answer is yes or no, scored as POPE scores them."""

    kind: Literal["yes_no"] = "yes_no"
    questions: Path
    """POPE's file (JSON lines, or a list: image, text, label), or VQA v2's questions with `annotations` beside."""
    annotations: Path | None = None
    prompt_suffix: str = ""


class CaptionConfig(AskedConfig):
    """One prompt for every image, compared with its captions."""

    kind: Literal["caption"] = "caption"
    captions: Path
    prompt: str
    meteor: bool = True
    """METEOR costs about 10 s of start-up."""
    max_new_tokens: Positive = 64


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
    """How much the images help: loss of the right answers with exchanged images, minus with their own."""

    kind: Literal["image_gain"] = "image_gain"
    data: Annotated[CaptionData | QuestionData, Field(discriminator="kind")]


class BenchmarkConfig(SampleConfig):
    """A published benchmark by its name (`eval.benchmarks.spec.names`), from its own files."""

    kind: Literal["benchmark"] = "benchmark"
    benchmark: str
    questions: tuple[str, ...]
    """Files as published, here or at an address."""
    annotations: str | None = None
    images: Path | None = None
    """The folder of images, where they are not inside of the files."""
    parse: str | None = None
    """Another parser than the benchmark's, such as the scale of the boxes that a model was trained to write."""
    max_new_tokens: Positive | None = None
    """Another limit than the benchmark's."""
    shuffle_pictures: bool = False


class RetrievalConfig(SampleConfig):
    """Images and their captions, one or several each, found by one another; `limit` counts images."""

    kind: Literal["retrieval"] = "retrieval"
    captions: Path
    images: Path
    prompt: str = "{caption}"
    """What the encoder reads; published figures have the caption alone."""


TaskConfig = Annotated[
    VqaConfig | YesNoConfig | CaptionConfig | ImageGainConfig | BenchmarkConfig | RetrievalConfig,
    Field(discriminator="kind"),
]
