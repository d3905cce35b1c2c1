"""Batches that stock transformers makes of a bundle: each answer is the one its question alone would get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import image
from tests.tools.conftest import beside

QUESTIONS = [f"{'What is there, ' * (number % 5)}and how many?" for number in range(8)]
PROBE = """
import json, sys
import torch, transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
assert transformers.__version__.startswith("4.57"), transformers.__version__
processor = AutoProcessor.from_pretrained(sys.argv[1])
model, report = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
assert not report["missing_keys"], report
chats = [
    [{"role": "user", "content": [{"type": "image", "image": Image.open(sys.argv[2])}, {"type": "text", "text": text}]}]
    for text in json.loads(sys.argv[3])
]
words = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
inputs = processor.apply_chat_template(chats, **words)
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1]:]
print(json.dumps(processor.tokenizer.batch_decode(ids, skip_special_tokens=True)))
"""


def chats(picture: Any) -> list[list[dict[str, Any]]]:
    return [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for text in QUESTIONS
    ]


def alone(bundle: Path, picture: Any) -> list[str]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(bundle)
    model = AutoModelForImageTextToText.from_pretrained(bundle, dtype="auto").eval()
    answers = []
    for chat in chats(picture):
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    return answers


def test_padding_on_changes_no_answer(trained: dict[str, Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    bundle, picture = beside(trained, "bundle"), image()
    processor = AutoProcessor.from_pretrained(bundle)
    model = AutoModelForImageTextToText.from_pretrained(bundle, dtype="auto").eval()
    words: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(
        chats(picture), add_generation_prompt=True, processor_kwargs={"padding": True}, **words
    )
    ids = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.batch_decode(ids, skip_special_tokens=True) == alone(bundle, picture)
    assert len(set(alone(bundle, picture))) > 1, "the answers must tell the questions apart"


def test_a_pipeline_in_batches_changes_no_answer(trained: dict[str, Any]) -> None:
    from transformers import pipeline

    bundle, picture = beside(trained, "bundle"), image()
    pipe = pipeline("image-text-to-text", model=str(bundle), device="cpu", dtype="auto")
    found = pipe(text=chats(picture), batch_size=8, max_new_tokens=8, return_full_text=False)
    assert [answer[0]["generated_text"].strip() for answer in found] == [
        answer.strip() for answer in alone(bundle, picture)
    ]


def test_nothing_tells_of_the_machine_that_made_it(trained: dict[str, Any]) -> None:
    bundle = beside(trained, "bundle")
    home = str(bundle.parent)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json"):
        text = (bundle / name).read_text()
        assert home not in text
        assert "is_local" not in text
        assert "_name_or_path" not in text
    assert json.loads((bundle / "tokenizer_config.json").read_text())["padding_side"] == "left"
    text_config = json.loads((bundle / "config.json").read_text())["text_config"]
    assert text_config["rope_theta"] == text_config["rope_parameters"]["rope_theta"]


@pytest.mark.slow
def test_transformers_4_57_gives_the_same_answers_in_a_batch(trained: dict[str, Any], tmp_path: Path) -> None:
    older = tmp_path / "older"
    packages = ["transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23"]
    words = ["install", "--quiet", "--no-deps", "--no-compile", "--target", str(older), *packages]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    bundle, picture = beside(trained, "bundle"), image()
    picture.save(tmp_path / "picture.png")
    command = [sys.executable, "-c", PROBE, str(bundle), str(tmp_path / "picture.png"), json.dumps(QUESTIONS)]
    environment = {**os.environ, "PYTHONPATH": str(older)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == alone(bundle, picture)
