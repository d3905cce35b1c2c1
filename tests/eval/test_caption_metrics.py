"""Caption metrics: the published figures with Java, an honest absence without."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from eval.caption_metrics import METRICS, score
from models.common.errors import InputError
from tests.eval.conftest import write_program
from tests.support.paths import data, needs_data

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java on PATH")

REFERENCES = {"1": ["A dog runs.", "The dog is running"], "2": ["A cat sleeps", "It's a sleeping cat."]}
HYPOTHESES = {"1": "A dog is running.", "2": "a cat"}


def magic() -> tuple[dict[str, list[str]], dict[str, str]]:
    rows = json.loads(data("eval", "flickr30k_magic_result.json").read_text())
    references = {str(place): row["captions"] for place, row in enumerate(rows)}
    return references, {str(place): row["prediction"] for place, row in enumerate(rows)}


@needs_data
@needs_java
@pytest.mark.slow
def test_published_figures() -> None:
    scores = score(*magic())
    published = [0.444983, 0.240800, 0.123671, 0.064271, 0.130806, 0.315662, 0.203724]
    assert [scores.metrics[name] for name in METRICS] == pytest.approx(published, abs=1e-6)
    assert (scores.tokenizer, scores.unavailable) == ("ptb", {})
    assert sum(scores.per_image["CIDEr"]) / len(scores.images) == pytest.approx(scores.metrics["CIDEr"])


@needs_data
def test_plain_words_score_near_ptb_words_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    scores = score(*magic())
    assert scores.metrics["METEOR"] is None
    assert scores.tokenizer == "plain"
    # 19 of the 5,000 references differ in a word; measured differences are below 1e-4
    for name, published in (("BLEU-4", 0.064271), ("ROUGE-L", 0.315662), ("CIDEr", 0.203724)):
        assert scores.metrics[name] == pytest.approx(published, abs=1e-3)


def test_without_java_only_meteor_is_missing_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    scores = score(REFERENCES, HYPOTHESES)
    assert [name for name in METRICS if scores.metrics[name] is None] == ["METEOR"]
    assert scores.unavailable == {"METEOR": "Java was not found on PATH"}
    assert scores.tokenizer_reason == "Java was not found on PATH"


def test_a_java_that_fails_is_as_good_as_none(fake_java: Path) -> None:
    write_program(fake_java, "echo 'Unable to locate a Java Runtime.' >&2; exit 1")
    scores = score(REFERENCES, HYPOTHESES)
    assert scores.tokenizer == "plain"
    assert "Unable to locate a Java Runtime." in scores.unavailable["METEOR"]


@needs_java
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("exec sleep 86400", "METEOR gave no answer in 0.5 s"),
        ("sleep 86400", "METEOR gave no answer in 0.5 s"),  # `java` is a script, and its child holds the pipes
        ("echo 'Could not reserve enough space for 2097152KB object heap' >&2; exit 1", "Could not reserve enough"),
        (
            "head -c 1000000 /dev/zero >&2; exec sleep 86400",
            "METEOR gave no answer in 0.5 s",
        ),  # more errors than a pipe holds
    ],
)
def test_meteor_that_hangs_or_dies_is_none_in_time(fake_java: Path, body: str, reason: str) -> None:
    """It would sleep for ever; scoring returns at all."""
    real = shutil.which("java", path=os.environ["PATH"].split(os.pathsep, 1)[1])
    write_program(fake_java, f'case "$*" in *PTBTokenizer*) exec {real} "$@";; esac\n{body}')
    scores = score(REFERENCES, HYPOTHESES, meteor_timeout_s=0.5)
    assert scores.metrics["METEOR"] is None
    assert reason in scores.unavailable["METEOR"]
    assert scores.metrics["CIDEr"] is not None


@needs_java
def test_odd_captions_stay_on_their_own_line() -> None:
    """An empty answer, or a separator that Java takes for a new line, must not shift the captions after it."""
    scores = score({"1": ["a dog"], "2": ["a cat"]}, {"1": "", "2": "a\u2028\x85cat\r\n"}, with_meteor=False)
    assert scores.per_image["ROUGE-L"] == [0.0, 1.0]
    assert scores.unavailable == {"METEOR": "it was not asked for"}


def test_cider_of_one_image_is_none() -> None:
    scores = score({"1": ["a dog"]}, {"1": "a dog"}, with_meteor=False)
    assert scores.metrics["CIDEr"] is None
    assert "only one image" in scores.unavailable["CIDEr"]


def test_refuses() -> None:
    with pytest.raises(InputError, match="1 images have a reference but no hypothesis, the first is 2"):
        score(REFERENCES, {"1": "a"})
    with pytest.raises(InputError, match="image 1 has no reference"):
        score({"1": []}, {"1": "a"})
    with pytest.raises(InputError, match="no captions"):
        score({}, {})
