"""Rows of every benchmark as its table on the hub has them, with right answers (columns: lmms-eval's task sources)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image


def png(colour: str, size: tuple[int, int] = (16, 16)) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


RED, LIME, BLUE = png("red"), png("lime"), png("blue")
LETTERED = {"A": "x", "B": "y", "C": "nan", "D": "nan"}
PEOPLE = [{"answer": "red", "answer_confidence": "yes", "answer_id": number} for number in range(10)]

Table = Sequence[Mapping[str, Any]]
HUB: dict[str, tuple[Table, Sequence[str]]] = {
    "ai2d": ([{"question": "?", "options": ["x", "y"], "answer": "1", "image": RED}], ["B"]),
    "chartqa": (
        [{"type": f"{kind}_test", "question": "?", "answer": "14", "image": RED} for kind in ("human", "augmented")],
        ["14", "14"],
    ),
    "coco_captions": (
        [
            {"question_id": f"COCO_val2014_{number:012d}.jpg", "image": image, "question": "Q", "answer": [text, text]}
            for number, image, text in ((7, RED, "a red square is here"), (80, LIME, "one wide green circle there"))
        ],
        ["a red square is here", "one wide green circle there"],
    ),
    "docvqa": (
        [
            {
                "questionId": "49153",
                "question": "?",
                "question_types": ["form"],
                "image": RED,
                "docId": 14465,
                "answers": ["0.28"],
                "data_split": "val",
            }
        ],
        ["0.28"],
    ),
    "flickr30k_captions": (
        [
            {"image": image, "caption": [text, text], "img_id": str(number), "filename": f"{number}.jpg"}
            for number, image, text in ((7, RED, "a red square is here"), (80, LIME, "one wide green circle there"))
        ],
        ["a red square is here", "one wide green circle there"],
    ),
    "gqa": (
        [
            {
                "id": "201307251",
                "imageId": "n161313",
                "question": "?",
                "answer": "no",
                "types": {"structural": "verify", "semantic": "global", "detailed": "weather"},
            }
        ],
        ["No"],
    ),
    "hallusionbench": (
        [
            {
                "category": "VD",
                "subcategory": "illusion",
                "visual_input": str(figure),
                "set_id": "0",
                "figure_id": str(figure),
                "question_id": str(question),
                "question": "?",
                "gt_answer": "1",
                "filename": f"./{figure}.png",
                "image": image,
            }
            for figure, image in ((0, RED), (1, LIME))
            for question in (0, 1)
        ],
        ["Yes", "Yes.", "yes", "Yes, it is."],
    ),
    "infovqa": (
        [
            {
                "questionId": "98313",
                "question": "?",
                "answers": ["Canada"],
                "answer_type": ["single span"],
                "image": RED,
                "image_url": "https://a.b/c.png",
                "ocr": "[]",
                "data_split": "val",
            }
        ],
        ["canada"],
    ),
    "llava_bench": (
        [{"question_id": 0, "question": "?", "caption": "c", "gpt_answer": "g", "category": "conv", "image": RED}],
        ["an answer"],
    ),
    "mathvista": (
        [
            {
                "pid": "1",
                "question": "How far?",
                "query": "Hint: ...\nQuestion: How far?",
                "image": "images/1.jpg",
                "decoded_image": RED,
                "choices": None,
                "unit": None,
                "precision": 1.0,
                "answer": "1.2",
                "question_type": "free_form",
                "answer_type": "float",
                "metadata": {"category": "math"},
            }
        ],
        ["1.2"],
    ),
    "mmbench_dev": (
        [
            {"index": index, "question": "?", "hint": "nan", "answer": "A", "category": "c", "image": RED} | LETTERED
            for index in (7, 1_000_007)
        ],
        ["A", "A"],
    ),
    "mme": (
        [
            {
                "question_id": f"{category}/0020.png",
                "image": image,
                "question": f"Is it {word}? Please answer yes or no.",
                "answer": answer,
                "category": category,
            }
            for category, image in (("code_reasoning", RED), ("existence", LIME))
            for word, answer in (("on", "Yes"), ("off", "No"))
        ],
        ["Yes", "No", "Yes", "No"],
    ),
    "mmmu_val": (
        [
            {
                "id": "validation_Accounting_1",
                "question": "<image 1> Which?",
                "options": "['$6', '$7']",
                "image_1": RED,
                "image_2": None,
                "answer": "B",
                "question_type": "multiple-choice",
                "subfield": "x",
            }
        ],
        ["B"],
    ),
    "mmvet": (
        [{"question_id": "v1_0", "image": RED, "question": "?", "answer": "a", "capability": "ocr,math"}],
        ["an answer"],
    ),
    "nocaps_captions": (
        [
            {"image": image, "image_id": number, "image_file_name": "a.jpg", "annotations_captions": [text, text]}
            for number, image, text in ((7, RED, "a red square is here"), (80, LIME, "one wide green circle there"))
        ],
        ["a red square is here", "one wide green circle there"],
    ),
    "ocrbench": (
        [
            {
                "dataset": dataset,
                "question": "what is written?",
                "question_type": kind,
                "answer": ["a b"],
                "image": RED,
            }
            for dataset, kind in (("IIIT5K", "Regular Text Recognition"), ("HME100k", "Handwritten"))
        ],
        ["It says A B.", "ab"],
    ),
    "pope": (
        [
            {
                "id": str(place),
                "question_id": str(place),
                "question": "Is there a dog?",
                "answer": answer,
                "image_source": "COCO_val2014_000000310196",
                "image": RED,
                "category": category,
            }
            for category in ("adversarial", "popular", "random")
            for place, answer in ((1, "yes"), (2, "no"))
        ],
        ["Yes", "No"] * 3,
    ),
    "realworldqa": ([{"image": RED, "image_path": "a.jpg", "question": "A. x B. y", "answer": "A"}], ["A"]),
    "refcoco": (
        [
            {
                "question_id": "1",
                "image": png("red", (100, 50)),
                "question": "Please carefully observe",
                "answer": ["left", "the left one"],
                "bbox": [0.0, 0.0, 50.0, 50.0],
                "file_name": "a.jpg",
            }
        ],
        ["[0, 0, 0.5, 1]", "[0.5, 0, 1, 1]"],
    ),
    "scienceqa": (
        [
            {"image": image, "question": "?", "choices": ["x", "y"], "answer": 1, "hint": "", "task": "closed choice"}
            for image in (RED, None)
        ],
        ["B", "B"],
    ),
    "seed": (
        [
            {
                "question_id": "101669",
                "question": "?",
                "answer": "A",
                "data_type": "image",
                "data_id": "1454426_2591111986",
                "image": [RED],
                "question_type_id": 1,
            }
            | {f"choice_{letter}": letter for letter in "abcd"},
            {
                "question_id": "v1",
                "question": "?",
                "answer": "A",
                "data_type": "video",
                "data_id": "a.mp4",
                "image": [RED, LIME, BLUE],
                "question_type_id": 10,
            }
            | {f"choice_{letter}": letter for letter in "abcd"},
        ],
        ["A", "A"],
    ),
    "textvqa": (
        [{"image_id": "0a", "question_id": 34602, "question": "?", "image": RED, "answers": ["nokia"] * 10}],
        ["nokia"],
    ),
    "textvqa_ocr": (
        [
            {
                "image_id": "0a",
                "question_id": 34602,
                "question": "?",
                "image": RED,
                "answers": ["nokia"] * 10,
                "ocr_tokens": ["NOKIA"],
            }
        ],
        ["nokia"],
    ),
    "vizwiz": (
        [
            {
                "question_id": "VizWiz_val_00000000.jpg",
                "image": RED,
                "question": "?",
                "answers": ["soap"] * 10,
                "category": "other",
            }
        ],
        ["soap"],
    ),
    "vqav2": (
        [{"question_id": 1, "image_id": 9, "image": RED, "question": "?", "answer_type": "other", "answers": PEOPLE}],
        ["red"],
    ),
}
"""Rows of each benchmark's table, and right answers to them (RefCOCO's second is wrong)."""

ELSEWHERE = {"verdicts"}
"""No published table: any file of verdicts."""
