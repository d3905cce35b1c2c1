"""An imported llama2.c model says what llama2.c says, and its tokenizer gives the same ids."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from models.common.errors import InputError
from tests.support.paths import data, needs_data
from tools.examples.synthetic.llama2c import import_llama2c, read_pieces, read_weights

TEXTS = [
    "Once upon a time",
    "Lily's mom said, \"Lily, let's go to the park.\"",
    "two  spaces\nand a line",
    " leading space",
    "naïve 日本 🙂",
    "x",
]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llama2c") / "story"
    folder = data("weights", "stories260K")
    header = import_llama2c(folder / "stories260K.bin", folder / "tok512.bin", out)
    assert (header.width, header.num_heads, header.num_key_value_heads, header.tied) == (64, 8, 4, True)
    return out


def encode_as_run_c(text: str, pieces: list[tuple[str, float]]) -> list[int]:
    """`encode` of llama2.c's run.c, step by step: characters, else bytes; then the best merge, leftmost first."""
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    tokens: list[int] = []
    for character in ("▁" + text).replace(" ", "▁"):
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        unions = [ids.get(pieces[a][0] + pieces[b][0]) for a, b in pairwise(tokens)]
        known = [(-pieces[union][1], at) for at, union in enumerate(unions) if union is not None]
        if not known:
            return [1, *tokens]
        at = min(known)[1]
        tokens[at : at + 2] = [ids[pieces[tokens[at]][0] + pieces[tokens[at + 1]][0]]]


@needs_data
def test_the_same_ids_as_run_c(story: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(story)
    pieces = read_pieces(data("weights", "stories260K", "tok512.bin"), 512)
    reference = data("weights", "stories260K", "expected_greedy_200steps.txt").read_text(encoding="utf-8")
    for text in [*TEXTS, reference]:
        assert tokenizer(text).input_ids == encode_as_run_c(text, pieces)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@needs_data
def test_the_same_greedy_text(story: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(story)
    model = AutoModelForCausalLM.from_pretrained(story)
    reference = data("weights", "stories260K", "expected_greedy_200steps.txt").read_text(encoding="utf-8").rstrip("\n")
    with torch.no_grad():
        ids = model.generate(torch.tensor([[1]]), max_length=201, do_sample=False, eos_token_id=None)
    said = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert len(reference) > 400
    assert said == reference


@needs_data
def test_a_cut_file_and_a_wrong_tokenizer_are_named(tmp_path: Path) -> None:
    folder = data("weights", "stories260K")
    cut = tmp_path / "cut.bin"
    cut.write_bytes((folder / "stories260K.bin").read_bytes()[:-4])
    with pytest.raises(InputError, match="its header asks for"):
        read_weights(cut)
    with pytest.raises(InputError, match=r"no llama2\.c tokenizer of 500 pieces"):
        read_pieces(folder / "tok512.bin", 500)
    with pytest.raises(InputError):
        import_llama2c(folder / "stories260K.bin", cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"short", struct.pack("<7i", 64, 172, 0, 8, 4, 512, 512)])
def test_what_is_no_model_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.bin"):
        read_weights(path)
