"""The backbones of the small world: seeded, in Hugging Face format, and apart from each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.common.errors import InputError
from tools.examples.synthetic.__main__ import main
from tools.examples.synthetic.language import ASSISTANT, END, PAD, collate, encode, examine, read_texts, train_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "world"
    main(["world", str(out), "--scenes", "320", "--held-out", "10"])
    return out


@pytest.fixture(scope="module")
def language(world: Path) -> Path:
    out = world.with_name("language")
    main(["language", str(world), str(out), "--steps", "4", "--batch-size", "8"])
    return out


@pytest.fixture(scope="module")
def clip(world: Path) -> Path:
    out = world.with_name("clip")
    main(["clip", str(world), str(out), "--steps", "4", "--batch-size", "16"])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["clip", "language"])
def test_same_seed_same_weights(verb: str, world: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first: Path = request.getfixturevalue(verb)
    rows = {"clip": "16", "language": "8"}[verb]
    for seed in "01":
        main([verb, str(world), str(tmp_path / seed), "--steps", "4", "--batch-size", rows, "--seed", seed])
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, tmp_path / "0", tmp_path / "1")]
    assert weights[0] == weights[1] != weights[2]


def test_the_language_model_has_never_heard_of_images(language: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language)
    model = AutoModelForCausalLM.from_pretrained(language)
    assert "<image>" not in tokenizer.get_vocab()
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    for word in ("red", "triangle", "bottom", "small"):
        assert len(tokenizer(f"a {word}").input_ids) == 2, "a word of the world is one token"
    reached = json.loads((language / "reached.json").read_text())
    assert {"steps", "train_loss", "loss", "exact"} == set(reached)


def test_the_chat_template_writes_what_was_learnt(world: Path, language: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language)
    messages = read_texts(world / "text.jsonl")[0]
    row = encode(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(text, add_special_tokens=False).input_ids == row.ids
    spoken = [token for token, said in zip(row.ids, row.spoken, strict=True) if said]
    answers = "".join(message["content"] + END for message in messages if message["role"] == "assistant")
    assert tokenizer.decode(spoken) == answers
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith(ASSISTANT)


def test_exact_counts_answers_not_tokens() -> None:
    class Oracle(torch.nn.Module):
        """Says every token rightly but the first of the last answer."""

        def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> object:
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 512).float()
            at = torch.nonzero(labels[0] != -100)[-2]
            logits[0, at - 1] = 0
            return type("Output", (), {"loss": 0.5, "logits": logits})()

    tokenizer = train_tokenizer(["a b c"])
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, labels = collate([encode(tokenizer, talk * 2), encode(tokenizer, talk)], tokenizer.pad_token_id)
    assert examine(Oracle(), ids, labels)["exact"] == pytest.approx(2 / 3)


def test_clip_opens_as_any_clip_does(clip: Path, world: Path) -> None:
    from transformers import AutoImageProcessor, CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(clip)
    processor = AutoImageProcessor.from_pretrained(clip)
    image = Image.open(world / "images" / "000000.jpg")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, tower.config.image_size, tower.config.image_size)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert hidden.shape == (1, 1 + (tower.config.image_size // tower.config.patch_size) ** 2, tower.config.hidden_size)
    assert {"steps", "train_loss", "text_to_picture", "picture_to_text"} == set(
        json.loads((clip / "reached.json").read_text())
    )


@pytest.mark.parametrize("verb", ["clip", "language"])
def test_what_is_no_world_is_named(verb: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make a world first"):
        main([verb, str(tmp_path), str(tmp_path / "out"), "--steps", "1"])
    assert not (tmp_path / "out").exists()
