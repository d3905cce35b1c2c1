"""The small world: seeded, balanced, true to its images, and held-out scenes stay out."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.common.errors import InputError
from tools.examples.synthetic.__main__ import main
from tools.examples.synthetic.questions import CAPTION_REQUEST, KINDS, ask_some, captions
from tools.examples.synthetic.world import CENTRES, COLOURS, SIDE, Scene, Thing, draw_scenes, render
from tools.examples.synthetic.write import examine

NUM_SCENES, NUM_HELD_OUT = 300, 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "world"
    assert main(["world", str(out), "--scenes", str(NUM_SCENES), "--held-out", str(NUM_HELD_OUT), "--seed", "3"]) == 0
    return out


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_same_seed_same_bytes_other_seed_other_bytes(world: Path, tmp_path: Path) -> None:
    size = ["--scenes", str(NUM_SCENES), "--held-out", str(NUM_HELD_OUT)]
    main(["world", str(tmp_path / "again"), *size, "--seed", "3"])
    main(["world", str(tmp_path / "other"), *size, "--seed", "4"])
    assert contents(tmp_path / "again") == contents(world)
    assert contents(tmp_path / "other")["lora.json"] != contents(world)["lora.json"]


def test_held_out_scenes_are_in_no_training_file(world: Path) -> None:
    held_out = {entry["caption"] for entry in load(world / "held_out" / "captions.json")["annotations"]}
    drawn = [json.loads(line) for line in (world / "captions.jsonl").read_text().splitlines()]
    assert held_out.isdisjoint(caption for entry in drawn for caption in entry["captions"])
    records = [*load(world / "align.json"), *load(world / "lora.json")]
    answers = {turn["value"] for record in records for turn in record["conversations"]}
    assert len(answers & {caption for entry in drawn for caption in entry["captions"]}) > NUM_SCENES / 4
    assert held_out.isdisjoint(answers)
    read = (world / "text.jsonl").read_text().splitlines()
    said = {message["content"] for line in read for message in json.loads(line)["messages"]}
    assert held_out.isdisjoint(said)


@pytest.mark.parametrize("name", ["align.json", "lora.json"])
def test_conversations_are_in_llava_format(world: Path, name: str) -> None:
    records = load(world / name)
    assert {record["image"] for record in records} == {path.name for path in (world / "images").iterdir()}
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n")
        assert human["value"].count("<image>") == 1
        assert gpt["value"]
    described = sum(CAPTION_REQUEST in record["conversations"][0]["value"] for record in records)
    assert 0 < described < len(records) / 2


def test_the_exam_is_in_vqa_and_coco_format(world: Path) -> None:
    folder = world / "held_out"
    questions, annotations = load(folder / "questions.json")["questions"], load(folder / "annotations.json")
    assert [question["question_id"] for question in questions] == [
        annotation["question_id"] for annotation in annotations["annotations"]
    ]
    assert all(len(annotation["answers"]) == 10 for annotation in annotations["annotations"])
    kinds = Counter(annotation["question_type"] for annotation in annotations["annotations"])
    assert set(kinds) == set(KINDS)
    images = load(folder / "captions.json")["images"]
    assert {question["image_id"] for question in questions} == {image["id"] for image in images}
    for image in images:
        assert Image.open(folder / "images" / image["file_name"]).size == (SIDE, SIDE)
        assert image["file_name"] == f"{image['id']:012d}.jpg"


def test_a_thing_is_drawn_where_and_in_what_colour_it_is_said() -> None:
    rng = random.Random(0)
    for scene in draw_scenes(50, rng):
        image = render(scene, rng)
        for place, (x, y) in enumerate(CENTRES):
            around = np.asarray(image.crop((x - 3, y - 3, x + 3, y + 3)))
            found = Counter(map(tuple, around.reshape(-1, 3).tolist()))
            thing = scene.at(place)
            if thing is None:
                assert len(found) == 1, "where nothing lies it is plain grey"
            else:
                ideal = COLOURS[thing.colour]
                distances = [max(abs(a - b) for a, b in zip(colour, ideal, strict=True)) for colour in found]
                assert min(distances) <= 14


def test_answers_follow_from_the_scene() -> None:
    scene = Scene((Thing(0, "large", "red", "circle"), Thing(3, "small", "blue", "square")))
    answers = {
        (question.text, question.answer)
        for seed in range(300)
        for question in ask_some(scene, random.Random(seed), len(KINDS))
    }
    for expected in [
        ("What is at the top left?", "red circle"),
        ("What is at the top right?", "nothing"),
        ("How many things are there?", "2"),
        ("What colour is the thing at the top left?", "red"),
        ("What shape is the blue thing?", "square"),
        ("Where is the blue thing?", "bottom right"),
        ("What size is the blue thing?", "small"),
        ("Which thing is further left?", "red circle"),
        ("Which thing is lower?", "blue square"),
    ]:
        assert expected in answers
    assert len({text for text, _ in answers}) == len(answers), "a question has one answer"
    assert captions(scene)[0] == "a large red circle at the top left and a small blue square at the bottom right."


def test_a_guess_by_the_kind_of_question_gets_little() -> None:
    rng = random.Random(0)
    asked = examine(list(draw_scenes(2000, rng)), rng)
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for _, question in asked:
        answers[question.kind][question.answer] += 1
    guessed = sum(counter.most_common(1)[0][1] for counter in answers.values())
    assert guessed / len(asked) < 0.42


def test_a_folder_in_use_is_left_alone(world: Path) -> None:
    before = contents(world)
    with pytest.raises(InputError, match="is there already"):
        main(["world", str(world), "--scenes", "3", "--held-out", "1"])
    assert contents(world) == before
    assert not world.with_name("world.partial").exists()
