"""Tasks on a predictor whose answers are known: what they ask, count and keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.tasks import make_task
from eval.tasks.config import CaptionConfig, CaptionData, ImageGainConfig, QuestionData, VqaConfig
from models.errors import InputError
from tests.support.benchmarks import PROMPT, Seer, TinyBenchmark


def vqa_config(tiny: TinyBenchmark, **options: object) -> VqaConfig:
    values = {"questions": tiny.questions, "annotations": tiny.annotations, "images": tiny.images, **options}
    return VqaConfig.model_validate(values)


def caption_config(tiny: TinyBenchmark, **options: object) -> CaptionConfig:
    values = {"captions": tiny.captions, "images": tiny.images, "prompt": PROMPT, "meteor": False, **options}
    return CaptionConfig.model_validate(values)


def test_vqa_of_one_who_sees_and_with_exchanged_pictures(tiny: TinyBenchmark) -> None:
    right = make_task(vqa_config(tiny)).run(Seer(), batch_size=3)
    blind = make_task(vqa_config(tiny, shuffle_pictures=True)).run(Seer(), batch_size=3)
    assert right.metrics == {"vqa_accuracy": 100.0}
    assert right.details["by_answer_type"] == {"other": 100.0, "yes/no": 100.0}
    assert blind.metrics == {"vqa_accuracy": 0.0}
    assert (right.shuffled, blind.shuffled) == (False, True)
    assert right.protocol == blind.protocol
    assert all(sample["picture"] != sample["shown"] for sample in blind.samples)
    assert [sample["answer"] for sample in right.samples] == ["red", "lime", "blue", "yes"]


def test_vqa_asks_in_batches_with_its_suffix(tiny: TinyBenchmark) -> None:
    seer = Seer()
    make_task(vqa_config(tiny, prompt_suffix="\nBriefly.")).run(seer, batch_size=3)
    assert seer.batch_sizes == [3, 1]
    assert seer.prompts[3] == "Is it red?\nBriefly."


def test_limit_takes_the_first_and_counts_them(tiny: TinyBenchmark) -> None:
    result = make_task(vqa_config(tiny, limit=2)).run(Seer(), batch_size=8)
    assert result.as_dict()["num_samples"] == 2


def test_a_protocol_is_prompt_decoding_normalisation_and_split(tiny: TinyBenchmark) -> None:
    def protocol(**options: object) -> str:
        return make_task(vqa_config(tiny, **options)).run(Seer(), batch_size=8).protocol

    base = protocol()
    assert base == protocol(seed=5, name="again")
    others = [
        protocol(prompt_suffix=" "),
        protocol(max_new_tokens=4),
        protocol(normalisation="evalai"),
        protocol(limit=3),
    ]
    tiny.questions.write_text(tiny.questions.read_text().replace("Which", "What"))
    others.append(protocol())
    assert len({base, *others}) == 6


def test_captions_of_one_who_sees_beat_exchanged_pictures(tiny: TinyBenchmark) -> None:
    right = make_task(caption_config(tiny)).run(Seer(), batch_size=2)
    blind = make_task(caption_config(tiny, shuffle_pictures=True)).run(Seer(), batch_size=2)
    assert right.metrics["CIDEr"] is not None
    assert blind.metrics["CIDEr"] is not None
    assert right.metrics["CIDEr"] > blind.metrics["CIDEr"]
    assert right.metrics["METEOR"] is None
    assert set(right.intervals) == {"ROUGE-L", "CIDEr"}
    assert right.facts["normalisation"] == right.details["tokenizer"]


@pytest.mark.parametrize("kind", ["captions", "questions"])
def test_image_gain_is_what_the_right_picture_saves(tiny: TinyBenchmark, kind: str) -> None:
    data: CaptionData | QuestionData = CaptionData(captions=tiny.captions, images=tiny.images, prompt=PROMPT)
    if kind == "questions":
        data = QuestionData(questions=tiny.questions, annotations=tiny.annotations, images=tiny.images)
    config = ImageGainConfig(data=data, limit=3)
    result = make_task(config).run(Seer(), batch_size=4)
    assert result.metrics == {"image_gain": 1.0, "loss": 1.0, "loss_shuffled": 2.0}
    assert (result.intervals["image_gain"].low, result.intervals["image_gain"].high) == (1.0, 1.0)
    assert len(result.samples) == (6 if kind == "captions" else 3)


def test_a_missing_picture_is_named_before_a_model_is_needed(tiny: TinyBenchmark) -> None:
    next(tiny.images.glob("*1.png")).unlink()
    for config in (vqa_config(tiny), caption_config(tiny)):
        with pytest.raises(InputError, match=r"lacks 1 of \d pictures, the first is"):
            make_task(config)


def test_a_damaged_picture_is_named(tiny: TinyBenchmark) -> None:
    damaged = next(tiny.images.glob("*1.png"))
    Path(damaged).write_bytes(b"no picture")
    with pytest.raises(InputError, match=damaged.name):
        make_task(vqa_config(tiny)).run(Seer(), batch_size=8)
