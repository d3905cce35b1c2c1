"""The synthetic world on disk: images, LLaVA-format conversations, text for a language model, a held-out exam.

    OUT/images/*.jpg      an image per training scene
    OUT/align.json        LLaVA's format, for the projector: a caption or a question for each image
    OUT/lora.json         LLaVA's format, for LoRA: a caption and questions, each a conversation of its own
    OUT/text.jsonl        {"messages": [...]}: conversations about other scenes, without images
    OUT/captions.jsonl    {"image", "captions"}: for contrastive training
    OUT/pairs.json        [{"file_name", "caption"}]: each image with one of its captions, for a Q-Former's contrast
    OUT/held_out/         images/, questions.json and annotations.json (VQA v2), captions.json (COCO), pairs.json

Owns the formats. Scenes that are held out are in no training file, by content (world.Scene's equality).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from models.common.files import new_directory
from tools.examples.synthetic.questions import CAPTION_REQUEST, KINDS, Question, ask_some, captions
from tools.examples.synthetic.world import Scene, draw_scenes, render

NUM_ANSWERS = 10
"""VQA v2 has ten human answers to a question; here all ten agree."""
QUESTIONS_PER_HELD_OUT_SCENE = 2
QUESTIONS_PER_SCENE = 3
CAPTION_SHARE = 0.5
"""Share of the scenes whose image is also described."""
_ANSWER_TYPES = {"count": "number"}


def write_world(out: Path, num_scenes: int, num_held_out: int, seed: int, scale: int = 1) -> None:
    """Draw a world and write it to `out`, which must be empty or missing. The same seed gives the same bytes.

    `scale` is the factor on the images' size; scenes and texts do not depend on it.
    """
    held_out = list(draw_scenes(num_held_out, random.Random(f"{seed}:held-out")))
    without = frozenset(held_out)
    scenes = list(draw_scenes(num_scenes, random.Random(f"{seed}:scenes"), without))
    read = draw_scenes(num_scenes, random.Random(f"{seed}:text"), without)
    with new_directory(out, replace=False) as folder:
        _write_training(folder, scenes, seed, scale)
        _write_text(folder / "text.jsonl", read, random.Random(f"{seed}:text-questions"))
        _write_held_out(folder / "held_out", held_out, seed, scale)


def _write_training(folder: Path, scenes: Sequence[Scene], seed: int, scale: int) -> None:
    (folder / "images").mkdir()
    ink, ask = random.Random(f"{seed}:ink"), random.Random(f"{seed}:questions")
    align, lora = [], []
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for number, scene in enumerate(tqdm(scenes, desc="scenes", unit="scene")):
            image = f"{number:06d}.jpg"
            _save(render(scene, ink, scale), folder / "images" / image)
            lines.write(json.dumps({"image": image, "captions": captions(scene)}) + "\n")
            for turn, question in enumerate(talk(scene, ask)):
                lora.append(llava_record(f"lora-{number:06d}-{turn}", image, [question]))
            align.append(llava_record(f"align-{number:06d}", image, [ask.choice(talk(scene, ask))]))
    _write_json(folder / "pairs.json", pairs([f"{n:06d}.jpg" for n in range(len(scenes))], scenes, seed))
    _write_json(folder / "align.json", align)
    _write_json(folder / "lora.json", lora)


def pairs(names: Sequence[str], scenes: Sequence[Scene], seed: int) -> list[dict[str, str]]:
    """Each image with a random one of its captions."""
    rng = random.Random(f"{seed}:pairs")
    return [
        {"file_name": name, "caption": rng.choice(captions(scene))} for name, scene in zip(names, scenes, strict=True)
    ]


def talk(scene: Scene, rng: random.Random) -> list[Question]:
    """The conversations about a scene, each of one turn.

    One turn per conversation: after other turns a question is further from its image, and a tiny model takes several
    times as long to learn to use it (docs/log.md).
    """
    described = [Question("caption", CAPTION_REQUEST, captions(scene)[0])] if rng.random() < CAPTION_SHARE else []
    return [*ask_some(scene, rng, QUESTIONS_PER_SCENE), *described]


def llava_record(name: str, image: str, turns: Sequence[Question]) -> dict[str, Any]:
    """A conversation in LLaVA's format; the image's tag comes before the first question."""
    conversation = []
    for index, turn in enumerate(turns):
        tag = "" if index else "<image>\n"
        conversation.append({"from": "human", "value": tag + turn.text})
        conversation.append({"from": "gpt", "value": turn.answer})
    return {"id": name, "image": image, "conversations": conversation}


def _write_text(path: Path, scenes: Any, rng: random.Random) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for scene in scenes:
            for question in talk(scene, rng):
                messages = [("user", question.text), ("assistant", question.answer)]
                turns = [{"role": role, "content": content} for role, content in messages]
                lines.write(json.dumps({"messages": turns}) + "\n")


def _write_held_out(folder: Path, scenes: Sequence[Scene], seed: int, scale: int) -> None:
    (folder / "images").mkdir(parents=True)
    ink, ask = random.Random(f"{seed}:held-out-ink"), random.Random(f"{seed}:held-out-questions")
    for image_id, scene in enumerate(scenes):
        _save(render(scene, ink, scale), folder / "images" / f"{image_id:012d}.jpg")
    asked = examine(scenes, ask)
    _write_json(folder / "questions.json", vqa_questions(asked))
    _write_json(folder / "annotations.json", vqa_annotations(asked))
    _write_json(folder / "captions.json", coco_captions(scenes))
    _write_json(folder / "pairs.json", pairs([f"{n:012d}.jpg" for n in range(len(scenes))], scenes, seed))


def examine(scenes: Sequence[Scene], rng: random.Random) -> list[tuple[int, Question]]:
    """(scene's index, question): every scene in turn, then every scene again, each kind equally often."""
    kinds = list(KINDS)
    asked: list[tuple[int, Question]] = []
    for turn in range(QUESTIONS_PER_HELD_OUT_SCENE):
        for index, scene in enumerate(scenes):
            start = index + turn * len(kinds) // 2
            order = [kinds[(start + step) % len(kinds)] for step in range(len(kinds))]
            asked.append((index, next(question for kind in order if (question := KINDS[kind](scene, rng)))))
    return asked


def vqa_questions(asked: Sequence[tuple[int, Question]]) -> dict[str, Any]:
    """VQA v2's questions file; image `image_id` is the file images/{image_id:012d}.jpg."""
    questions = [
        {"question_id": number, "image_id": image_id, "question": question.text}
        for number, (image_id, question) in enumerate(asked)
    ]
    return {"task_type": "Open-Ended", "data_type": "small world", "questions": questions}


def vqa_annotations(asked: Sequence[tuple[int, Question]]) -> dict[str, Any]:
    """VQA v2's annotations file: ten equal answers each; `question_type` is the question's kind."""
    annotations = [
        {
            "question_id": number,
            "image_id": image_id,
            "question_type": question.kind,
            "answer_type": _ANSWER_TYPES.get(question.kind, "other"),
            "multiple_choice_answer": question.answer,
            "answers": [
                {"answer_id": answer, "answer": question.answer, "answer_confidence": "yes"}
                for answer in range(1, NUM_ANSWERS + 1)
            ],
        }
        for number, (image_id, question) in enumerate(asked)
    ]
    return {"data_type": "small world", "annotations": annotations}


def coco_captions(scenes: Sequence[Scene]) -> dict[str, Any]:
    """COCO's captions file: the images with their file names, and three captions of each."""
    images = [{"id": index, "file_name": f"{index:012d}.jpg"} for index in range(len(scenes))]
    texts = [(index, caption) for index, scene in enumerate(scenes) for caption in captions(scene)]
    annotations = [{"id": number, "image_id": index, "caption": text} for number, (index, text) in enumerate(texts)]
    return {"images": images, "annotations": annotations}


def _save(image: Image.Image, path: Path) -> None:
    """Save as JPEG with full colour resolution, in a fifth of a PNG's time."""
    image.save(path, quality=92, subsampling=0)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")), encoding="utf-8")
