"""A published model without our manifest opens as a baseline, and a line says that nothing vouches for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import sightline
from eval.live import LiveModel
from eval.predictor import Decoding, Predictor, Query, Turn
from models.build import build_vlm, read_metadata
from models.common.errors import InputError
from models.opening import open_model, open_processor
from tests.support.bundles import image
from tests.support.published import FAMILIES, make_published, published


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_it_answers_as_its_own_class_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, num_beams: int
) -> None:
    folder = make_published(tmp_path / family, family)
    with caplog.at_level(logging.WARNING):
        predictor = sightline.load(folder, device="cpu")
    assert f"{folder}: no sightline.json in it" in caplog.text
    assert predictor.manifest is None
    drawn = image("square", (90, 40))
    answer = predictor.answer(
        [Query((drawn,), (Turn("user", "What is it?"),))], Decoding(max_new_tokens=8, num_beams=num_beams)
    )[0]
    model, processor = open_model(folder, torch.device("cpu")), open_processor(folder)
    content = [{"type": "image", "image": drawn}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=num_beams)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_model_that_would_be_read_wrongly_is_refused(tmp_path: Path) -> None:
    folder = make_published(tmp_path / "llava")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "qwen3_5"}))
    with pytest.raises(InputError, match="is not opened: its layers are recurrent"):
        Predictor.open(folder, device="cpu")


def test_a_directory_that_is_no_model_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no sightline\.json in it, so it is no bundle"):
        Predictor.open(tmp_path, device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_training_answers_as_its_directory_does(tmp_path: Path, family: str) -> None:
    """Rows of several lengths together; a model of native resolution counts positions by row in both."""
    folder = make_published(tmp_path / family, family)
    source = published(folder)
    vlm = build_vlm(source, read_metadata(source, 256), frozen_dtype=torch.float32, seed=0).eval()
    stock = Predictor.open(folder, device="cpu")
    live = Predictor(
        LiveModel(vlm, generation_config=stock.model.generation_config), stock.processor, device=torch.device("cpu")
    )
    queries = [Query((image("circle", size),), (Turn("user", f"What is {size}?"),)) for size in ((64, 64), (90, 40))]
    queries += [Query((), (Turn("user", "No picture?"),))]
    decoding = Decoding(max_new_tokens=8)
    assert live.answer(queries, decoding) == stock.answer(queries, decoding)
