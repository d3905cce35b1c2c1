"""The ViT that is taught what lies where, and the text encoder that a Q-Former starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.languages.text import load_encoder_tokenizer
from tools.examples.synthetic.__main__ import main
from tools.examples.synthetic.encoders import NOTHING, labels
from tools.examples.synthetic.world import COLOURS, PLACES, SHAPES, SIZES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoders") / "world"
    main(["world", str(out), "--scenes", "300", "--held-out", "5"])
    return out


def test_a_caption_says_what_lies_where() -> None:
    found = labels("a small red circle at the top right and a large orange cross at the bottom left.")
    empty = [NOTHING, NOTHING, len(SHAPES)]
    assert found[0] == [*empty, 0]
    assert found[1] == [SIZES.index("small"), list(COLOURS).index("red"), SHAPES.index("circle"), 1]
    assert found[2] == [SIZES.index("large"), list(COLOURS).index("orange"), SHAPES.index("cross"), 2]
    assert found[3] == [*empty, 3]
    assert len(found) == len(PLACES)


def test_every_image_has_one_pair_of_its_own_captions(world: Path) -> None:
    captions = [json.loads(line) for line in (world / "captions.jsonl").read_text().splitlines()]
    pairs = json.loads((world / "pairs.json").read_text())
    assert [pair["file_name"] for pair in pairs] == [each["image"] for each in captions]
    assert all(pair["caption"] in each["captions"] for pair, each in zip(pairs, captions, strict=True))
    assert len(json.loads((world / "held_out" / "pairs.json").read_text())) == 5


def test_both_are_hugging_face_folders(world: Path, tmp_path: Path) -> None:
    from transformers import DistilBertForMaskedLM, ViTModel

    main(["vit", str(world), str(tmp_path / "vit"), "--steps", "3", "--batch-size", "16"])
    main(["text-encoder", str(world), str(tmp_path / "text")])
    vit = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    assert vit.config.num_hidden_layers == 3
    assert {"steps", "train_loss", "places_right"} == set(json.loads((tmp_path / "vit" / "reached.json").read_text()))
    text = DistilBertForMaskedLM.from_pretrained(tmp_path / "text")
    tokenizer = load_encoder_tokenizer(str(tmp_path / "text"))
    ids = tokenizer("a large red circle at the top left.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["[CLS]", "a", "large"]
    assert ids[-1] == tokenizer.eos_token_id
    assert max(ids) < text.config.vocab_size
