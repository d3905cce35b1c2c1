"""Predictions of the field's other programs, and which answer belongs to which row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.rows import read_rows
from eval.benchmarks.spec import load
from eval.predictions import answers_to, read_predictions
from eval.score import Sources, score
from models.common.errors import InputError

QUESTIONS = [
    {"question_id": 1, "category": "random", "image": "a.jpg", "text": "A dog?", "label": "yes"},
    {"question_id": 2, "category": "random", "image": "a.jpg", "text": "A cat?", "label": "no"},
]


def lines(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return lines(tmp_path / "coco_pope_random.json", QUESTIONS)


def answers(questions: str, file: str) -> list[str]:
    benchmark = load("pope")
    entries, _ = read_predictions(file, benchmark)
    return answers_to(read_rows(benchmark, [questions]).rows, entries, benchmark, file)


def test_llavas_answers_are_paired_by_position_where_they_name_no_category(questions: str, tmp_path: Path) -> None:
    own = [{"question_id": 1, "text": "Yes"}, {"question_id": 2, "text": "No"}]
    assert answers(questions, lines(tmp_path / "a.jsonl", own)) == ["Yes", "No"]
    with pytest.raises(InputError, match="in another order"):
        answers(questions, lines(tmp_path / "a.jsonl", own[::-1]))


def test_llavas_answers_may_count_on_where_our_files_begin_anew(questions: str, tmp_path: Path) -> None:
    """As in its POPE, whose ids go on over the three files: the prompts show that the order is right."""
    own = [
        {"question_id": 3000 + row["question_id"], "prompt": f"{row['text']}\nIn one word.", "text": row["label"]}
        for row in QUESTIONS
    ]
    assert answers(questions, lines(tmp_path / "a.jsonl", own)) == ["yes", "no"]
    with pytest.raises(InputError, match="in another order than the questions: 3002 stands where random/1 is"):
        answers(questions, lines(tmp_path / "a.jsonl", own[::-1]))


TEXTVQA = [
    {"question_id": 34602, "image_id": "003a", "question": "What is the brand?", "answers": ["dakota"] * 10},
    {"question_id": 34603, "image_id": "003a", "question": "What is the brand? Or the name", "answers": ["digi"] * 10},
    {"question_id": 34604, "image_id": "b9dc", "question": "What is the brand?", "answers": ["copen"] * 10},
]


def test_llavas_answers_that_name_pictures_are_joined_by_picture_and_question(tmp_path: Path) -> None:
    """As in its TextVQA, whose `question_id` is the picture's, and in its MME."""
    truth = tmp_path / "TextVQA_0.5.1_val.json"
    truth.write_text(json.dumps({"data": TEXTVQA}))
    own = [
        {
            "question_id": row["image_id"],
            "prompt": f"{row['question']}\nReference OCR token: NINK, NK\nIn one word.",
            "text": row["answers"][0],
        }
        for row in TEXTVQA
    ]
    for order in (own, own[::-1], [own[1], own[2], own[0]]):
        file = lines(tmp_path / "llava.jsonl", order)
        assert score("textvqa_ocr", Sources((file,), (str(truth),))).metrics == {"accuracy": 100.0}
    with pytest.raises(InputError, match="lacks 1 of 3 answers, the first is to 34603"):
        score("textvqa_ocr", Sources((lines(tmp_path / "llava.jsonl", own[::2]),), (str(truth),)))
    with pytest.raises(InputError, match="no question is left of picture 003a that 'What is the brand"):
        score("textvqa_ocr", Sources((lines(tmp_path / "llava.jsonl", [own[0], *own]),), (str(truth),)))
    posters = tmp_path / "posters.txt"
    posters.write_text("".join(f"{name}.jpg\tIs it {name}? Please answer yes or no.\tYes\n" for name in "ab"))
    own = [
        {"question_id": f"posters/{name}.png", "prompt": f"Is it {name}?\nIn one word.", "text": "Yes"} for name in "ba"
    ]
    file = lines(tmp_path / "llava.jsonl", own)
    assert score("mme", Sources((file,), (str(posters),))).metrics["accuracy"] == 100.0


def test_answers_with_the_whole_key_may_stand_in_any_order(questions: str, tmp_path: Path) -> None:
    own = [{"question_id": number, "category": "random", "response": str(number)} for number in (2, 1)]
    assert answers(questions, lines(tmp_path / "a.jsonl", own)) == ["1", "2"]


def test_lmms_evals_samples_are_joined_by_the_docs_fields(questions: str, tmp_path: Path) -> None:
    own = [{"doc_id": place, "doc": doc, "filtered_resps": [doc["text"]]} for place, doc in enumerate(QUESTIONS[::-1])]
    file = lines(tmp_path / "samples.jsonl", own)
    assert answers(questions, file) == ["A dog?", "A cat?"]
    assert score("pope", Sources((file,))).metrics["accuracy"] == 0.5


def test_lmms_evals_samples_without_docs_are_joined_by_place_where_the_question_stands_there(
    questions: str, tmp_path: Path
) -> None:
    own = [
        {"doc_id": place, "filtered_resps": doc["text"], "input": f"{doc['text'].upper()}\nIn a word.", "target": "yes"}
        for place, doc in enumerate(QUESTIONS)
    ]
    assert answers(questions, lines(tmp_path / "samples.jsonl", own[::-1])) == [doc["text"] for doc in QUESTIONS]
    exchanged = [{**one, "doc_id": other["doc_id"]} for one, other in zip(own, own[::-1], strict=True)]
    with pytest.raises(InputError, match="2 of 2 documents ask something else"):
        answers(questions, lines(tmp_path / "samples.jsonl", exchanged))
    with pytest.raises(InputError, match="answers to 1 documents, and there are 2"):
        answers(questions, lines(tmp_path / "samples.jsonl", own[:1]))
    with pytest.raises(InputError, match="answered twice"):
        answers(questions, lines(tmp_path / "samples.jsonl", [*own, own[0]]))
    with pytest.raises(InputError, match="give the benchmark's own files with --questions"):
        score("pope", Sources((lines(tmp_path / "samples.jsonl", own),)))


def test_a_table_with_predictions(tmp_path: Path) -> None:
    path = tmp_path / "mmbench.tsv"
    path.write_text("index\tquestion\tA\tB\tanswer\tprediction\n7\tWhich?\tx\ty\tB\tB\n1000007\tWhich?\ty\tx\tA\tB\n")
    found = score("mmbench_dev", Sources((str(path),))).metrics
    assert found == {"circular": 0.0, "vanilla": 100.0}


def test_mmes_results_are_files_of_a_category_with_the_answer_in_a_fourth_column(tmp_path: Path) -> None:
    files = []
    for category in ("existence", "color"):
        path = tmp_path / f"{category}.txt"
        texts = (f"a.jpg\tIs it {word}?\t{truth}\tYes, it is\n" for word, truth in (("red", "Yes"), ("big", "No")))
        path.write_text("".join(texts))
        files.append(str(path))
    found = score("mme", Sources(tuple(files))).details["groups"]
    assert found["accuracy/existence"] == found["score/color"] == 50.0


def test_mm_vets_own_grades_have_the_scores_of_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "model_gpt-4-grade-2runs.json"
    grades = {"v1_0": [0.9, 0.7], "v1_1": [0.0, 0.1]}
    path.write_text(json.dumps({key: {"model": ["gpt-4"] * 2, "score": value} for key, value in grades.items()}))
    found = score("mmvet", Sources((str(path),)), judge="gpt-4").details["groups"]
    assert found == {"total/1": pytest.approx(45.0), "total/2": pytest.approx(40.0)}


def test_an_empty_cell_is_an_empty_answer(questions: str, tmp_path: Path) -> None:
    own = [{"question_id": 1, "category": "random", "prediction": None}, {**QUESTIONS[1], "prediction": ""}]
    assert answers(questions, lines(tmp_path / "a.jsonl", own)) == ["", ""]
    path = tmp_path / "table.tsv"
    path.write_text("index\tquestion\tA\tB\tanswer\tprediction\n7\tWhich?\tx\ty\tB\t\n8\tWho?\ty\tx\tA\tA\n")
    assert score("mmbench_dev", Sources((str(path),))).metrics["vanilla"] == 50.0


@pytest.mark.slow
def test_submissions_of_docvqa_coco_and_mmvet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without Java's METEOR, which takes ten seconds
    truth = tmp_path / "val.json"
    truth.write_text(json.dumps({"data": [{"questionId": 5, "question": "?", "image": "a", "answers": ["seven"]}]}))
    file = tmp_path / "submission.json"
    file.write_text(json.dumps([{"questionId": 5, "answer": "Seven"}]))
    assert score("docvqa", Sources((str(file),), (str(truth),))).metrics == {"anls": 100.0}
    captions = tmp_path / "captions.json"
    captions.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
                "annotations": [{"image_id": 1, "caption": "a red dog"}, {"image_id": 2, "caption": "two blue cats"}],
            }
        )
    )
    file.write_text(json.dumps([{"image_id": 2, "caption": "two blue cats"}, {"image_id": 1, "caption": "a red dog"}]))
    assert score("coco_captions", Sources((str(file),), (str(captions),))).metrics["ROUGE-L"] == pytest.approx(1.0)
    file.write_text(json.dumps({"v1_0": "an answer"}))
    assert read_predictions(str(file), load("mmvet"))[0] == [{"id": "v1_0", "prediction": "an answer"}]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"question_id": 1, "category": "random", "text": "Yes"}], "lacks 1 of 2 answers, the first is to random/2"),
        ([{"question_id": 1, "text": "Yes"}], "1 answers to 2 questions"),
        ([{"question_id": 1, "category": "random", "text": "Yes"}] * 2, "answered twice"),
        ([{"question_id": number, "category": "random"} for number in (1, 2)], "has no answer"),
        (
            [{"question_id": number, "category": "random", "text": "Yes"} for number in (1, 2, 3)],
            "3 answers to 2 questions",
        ),
    ],
)
def test_what_is_missing_doubled_or_foreign_is_an_error_never_wrong(
    questions: str, tmp_path: Path, entries: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        answers(questions, lines(tmp_path / "a.jsonl", entries))


def test_a_file_that_is_torn_or_has_no_truths_says_so(questions: str, tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_text(Path(questions).read_text()[:-9])
    with pytest.raises(InputError, match=rf"line 2 of {torn}: not valid JSON .*: was the file written to its end\?"):
        score("pope", Sources((str(torn),)))
    alone = lines(tmp_path / "alone.jsonl", [{"question_id": 1, "text": "Yes"}])
    with pytest.raises(InputError, match=r"holds no right answers \(label or answer\): give .* with --questions"):
        score("pope", Sources((alone,)))
