"""Tasks on a predictor whose answers are known: what they ask, count and keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.results import table
from eval.tasks import make_task
from eval.tasks.config import CaptionConfig, CaptionData, ImageGainConfig, QuestionData, VqaConfig, YesNoConfig
from models.common.errors import InputError
from tests.support.benchmarks import PROMPT, Seer, TinyBenchmark, write


def vqa_config(tiny: TinyBenchmark, **options: object) -> VqaConfig:
    values = {"questions": tiny.questions, "annotations": tiny.annotations, "images": tiny.images, **options}
    return VqaConfig.model_validate(values)


def caption_config(tiny: TinyBenchmark, **options: object) -> CaptionConfig:
    values = {"captions": tiny.captions, "images": tiny.images, "prompt": PROMPT, "meteor": False, **options}
    return CaptionConfig.model_validate(values)


def test_vqa_of_one_who_sees_and_with_exchanged_images(tiny: TinyBenchmark) -> None:
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


def test_captions_of_one_who_sees_beat_exchanged_images(tiny: TinyBenchmark) -> None:
    right = make_task(caption_config(tiny)).run(Seer(), batch_size=2)
    blind = make_task(caption_config(tiny, shuffle_pictures=True)).run(Seer(), batch_size=2)
    assert right.metrics["CIDEr"] is not None
    assert blind.metrics["CIDEr"] is not None
    assert right.metrics["CIDEr"] > blind.metrics["CIDEr"]
    assert right.metrics["METEOR"] is None
    assert set(right.intervals) == {"ROUGE-L", "CIDEr"}
    assert right.facts["normalisation"] == right.details["tokenizer"]


@pytest.mark.parametrize("kind", ["captions", "questions"])
def test_image_gain_is_what_the_right_image_saves(tiny: TinyBenchmark, kind: str) -> None:
    data: CaptionData | QuestionData = CaptionData(captions=tiny.captions, images=tiny.images, prompt=PROMPT)
    if kind == "questions":
        data = QuestionData(questions=tiny.questions, annotations=tiny.annotations, images=tiny.images)
    config = ImageGainConfig(data=data, limit=3)
    result = make_task(config).run(Seer(), batch_size=4)
    assert result.metrics == {"image_gain": 1.0, "loss": 1.0, "loss_shuffled": 2.0}
    assert (result.intervals["image_gain"].low, result.intervals["image_gain"].high) == (1.0, 1.0)
    assert len(result.samples) == (6 if kind == "captions" else 3)
    assert "note" not in result.details


def test_a_gain_that_may_be_none_says_that_the_image_is_not_looked_at_and_what_to_try(tiny: TinyBenchmark) -> None:
    class Blind(Seer):
        def loss(self, queries: Sequence[Any], answers: Sequence[str]) -> list[tuple[float, int]]:
            return [(1.5 * len(answer.split()), len(answer.split())) for answer in answers]

    data = CaptionData(captions=tiny.captions, images=tiny.images, prompt=PROMPT)
    result = make_task(ImageGainConfig(data=data, limit=3)).run(Blind(), batch_size=4)
    assert result.metrics["image_gain"] == 0.0
    for word in ("not looked at", "epochs", "image tokens", "feature_layer", "data.template.opening", "preflight"):
        assert word in result.details["note"]
    assert result.details["note"] in table([result.as_dict()])


def test_a_missing_image_is_named_before_a_model_is_needed(tiny: TinyBenchmark) -> None:
    next(tiny.images.glob("*1.png")).unlink()
    for config in (vqa_config(tiny), caption_config(tiny)):
        with pytest.raises(InputError, match=r"lacks 1 of \d images, the first is"):
            make_task(config)


def test_a_damaged_image_is_named_before_a_model_is_needed(tiny: TinyBenchmark) -> None:
    damaged = next(tiny.images.glob("*1.png"))
    Path(damaged).write_bytes(b"no image")
    with pytest.raises(InputError, match=damaged.name):
        make_task(vqa_config(tiny))


def yes_no_config(tiny: TinyBenchmark, records: list[dict[str, Any]], **options: object) -> YesNoConfig:
    lines = "\n".join(json.dumps(record) for record in records)
    (tiny.folder / "pope.json").write_text(lines)
    return YesNoConfig.model_validate({"questions": tiny.folder / "pope.json", "images": tiny.images, **options})


def test_yes_no_questions_of_one_who_sees(tiny: TinyBenchmark) -> None:
    records = [
        {"question_id": number, "image": f"scene_{number:012d}.png", "text": "Is it red?", "label": label}
        for number, label in enumerate(("yes", "no", "No."))
    ]
    right = make_task(yes_no_config(tiny, records, prompt_suffix="\nBriefly.")).run(Seer(), batch_size=2)
    assert right.metrics == {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_share": 1 / 3}
    assert right.details["num_unclear"] == 0
    assert [sample["counts_as"] for sample in right.samples] == ["yes", "no", "no"]
    blind = make_task(yes_no_config(tiny, records, shuffle_pictures=True)).run(Seer(), batch_size=2)
    assert blind.metrics["accuracy"] == 1 / 3


def test_yes_no_questions_in_the_two_files_of_vqa(tiny: TinyBenchmark) -> None:
    write(tiny.questions, {"questions": [{"question_id": 0, "image_id": 0, "question": "Is it red?"}]})
    write(tiny.annotations, {"annotations": [{"question_id": "0", "answers": [{"answer": "Yes"}]}]})
    config = YesNoConfig(questions=tiny.questions, annotations=tiny.annotations, images=tiny.images)
    assert make_task(config).run(Seer(), batch_size=2).metrics["accuracy"] == 1.0


def test_a_label_that_is_neither_yes_nor_no_is_named(tiny: TinyBenchmark) -> None:
    records = [{"question_id": 4, "image": "scene_000000000000.png", "text": "Which?", "label": "red"}]
    with pytest.raises(InputError, match="question 4: its label is 'red', neither yes nor no"):
        make_task(yes_no_config(tiny, records))


def test_one_right_answer_that_differs_in_case_alone_is_pointed_out(tiny: TinyBenchmark) -> None:
    """`official` is case-sensitive where people agree, so a model that says Red would silently have 0."""
    text = tiny.annotations.read_text()
    for word in ("red", "lime", "blue", "yes"):
        text = text.replace(f'"{word}"', f'"{word.title()}"')
    tiny.annotations.write_text(text)
    result = make_task(vqa_config(tiny)).run(Seer(), batch_size=8)
    assert result.metrics == {"vqa_accuracy": 0.0}
    assert "0.00 %; with normalisation evalai it is 100.00 %" in result.details["note"]
    assert result.details["note"] in table([result.as_dict()])
    assert "note" not in make_task(vqa_config(tiny, normalisation="evalai")).run(Seer(), batch_size=8).details


def test_three_human_answers_are_named_before_a_model_is_needed(tiny: TinyBenchmark) -> None:
    annotations = json.loads(tiny.annotations.read_text())
    annotations["annotations"][-1]["answers"] = annotations["annotations"][-1]["answers"][:3]
    write(tiny.annotations, annotations)
    with pytest.raises(InputError, match=r"question 3 needs at least 4 human answers .*found 3"):
        make_task(vqa_config(tiny))


def test_an_image_outside_the_folder_is_not_shown(tiny: TinyBenchmark) -> None:
    (tiny.images.parent / "secret.png").write_bytes(next(tiny.images.glob("*.png")).read_bytes())
    write(tiny.captions, [{"file_name": "../secret.png", "caption": "a"}])
    with pytest.raises(InputError, match=r"'\.\./secret\.png', which leads out of the folder"):
        make_task(caption_config(tiny))
