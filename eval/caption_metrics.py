"""Caption metrics: BLEU-1..4, METEOR, ROUGE-L and CIDEr, as coco-caption publishes them.

Owns: which scorers run, on which tokens, and null where a metric cannot be computed. Does not own the tokenization
(`eval.caption_text`), files or models. The scorers are pycocoevalcap's, called directly: its `eval.py` also runs
SPICE, which downloads CoreNLP.

What can't be computed is None with a reason, never 0: METEOR without Java, CIDEr of a single image (its inverse
document frequencies come from the evaluated references, so one image scores exactly 0 whatever its caption).
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as coco_meteor
from pycocoevalcap.rouge.rouge import Rouge

from eval.caption_text import Captions, JavaError, Tokenizer, last_line, start_java, stop, tokenize
from models.common.errors import InputError

METEOR_TIMEOUT_S = 600.0
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores on coco-caption's scale (BLEU, METEOR, ROUGE-L in [0, 1], CIDEr in [0, 10]).

    `per_image` holds, for the metrics whose corpus score is the mean over images (ROUGE-L, CIDEr), each image's own
    score in the order of `images`. `unavailable` gives the reason for each metric that is None.
    """

    metrics: dict[str, float | None]
    per_image: dict[str, list[float]]
    images: tuple[str, ...]
    tokenizer: Tokenizer
    tokenizer_reason: str | None
    unavailable: dict[str, str]


def score(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    *,
    with_meteor: bool = True,
    meteor_timeout_s: float = METEOR_TIMEOUT_S,
) -> CaptionScores:
    """Score one hypothesis per image against that image's references; both are keyed by image.

    METEOR takes about 10 s to start and 2 GB; `with_meteor=False` leaves it out: None, with that reason.

    Raises:
        InputError: no images, an image without references or without a hypothesis, or one too many.
    """
    _check(references, hypotheses)
    hypothesis_lists = {image: [hypotheses[image]] for image in references}
    words = tokenize(references, hypothesis_lists)
    gts, res = words.captions
    unavailable: dict[str, str] = {}
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    metrics.update({f"BLEU-{order}": float(value) for order, value in enumerate(bleu, start=1)})
    rouge, rouge_per_image = Rouge().compute_score(gts, res)
    metrics["ROUGE-L"] = float(rouge)
    per_image = {"ROUGE-L": [float(value) for value in rouge_per_image]}
    if len(gts) > 1:
        cider, cider_per_image = Cider().compute_score(gts, res)
        metrics["CIDEr"] = float(cider)
        per_image["CIDEr"] = [float(value) for value in cider_per_image]
    else:
        unavailable["CIDEr"] = "it weighs words by how many images they occur in, and there is only one image"
    try:
        if not with_meteor:
            raise JavaError("it was not asked for")
        if words.reason is not None:
            raise JavaError(words.reason)
        metrics["METEOR"] = meteor_score(gts, res, timeout_s=meteor_timeout_s)
    except JavaError as error:
        unavailable["METEOR"] = str(error)
    return CaptionScores(metrics, per_image, tuple(gts), words.tokenizer, words.reason, unavailable)


def _check(references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str]) -> None:
    if not references:
        raise InputError("no captions to score")
    bare = [image for image, captions in references.items() if not captions]
    if bare:
        raise InputError(f"image {bare[0]} has no reference caption")
    for what, images in (
        ("a reference but no hypothesis", references.keys() - hypotheses.keys()),
        ("a hypothesis but no reference", hypotheses.keys() - references.keys()),
    ):
        if images:
            raise InputError(f"{len(images)} images have {what}, the first is {min(images)}")


class _Meteor(coco_meteor.Meteor):
    """pycocoevalcap's driver of the METEOR 1.5 jar, started so that it can't hang on its own error output.

    The base class gives the jar an error pipe that nobody reads, and takes the machine's default encoding.
    """

    def __init__(self, errors: IO[bytes]) -> None:
        jar = Path(coco_meteor.__file__).with_name(coco_meteor.METEOR_JAR)
        arguments = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        self.lock: Any = threading.Lock()
        self.meteor_p = start_java(arguments, errors)

    def close(self) -> None:
        """End the process. A failed `compute_score` leaves its lock taken, on which the base would wait."""
        stop(self.meteor_p)
        for pipe in (self.meteor_p.stdin, self.meteor_p.stdout):
            with contextlib.suppress(OSError):  # closing flushes to a reader that is gone
                if pipe is not None:
                    pipe.close()

    def __del__(self) -> None:
        """Override pycocoevalcap's, which waits for the lock that a failed call leaves taken."""


def meteor_score(gts: Captions, res: Captions, *, timeout_s: float = METEOR_TIMEOUT_S) -> float:
    """METEOR 1.5 of tokenized captions: English, all modules, its own normalisation.

    Raises:
        JavaError: Java is missing or fails, or gave no answer within `timeout_s`.
    """
    with tempfile.TemporaryFile() as errors:
        scorer = _Meteor(errors)
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            stop(scorer.meteor_p)

        timer = threading.Timer(timeout_s, give_up)
        timer.start()
        try:
            corpus_score, _ = scorer.compute_score(gts, res)
        except (OSError, ValueError):
            reason = f"gave no answer in {timeout_s:g} s" if timed_out.is_set() else f"failed: {last_line(errors)}"
            raise JavaError(f"METEOR {reason}") from None
        finally:
            timer.cancel()
            scorer.close()
    return float(corpus_score)
