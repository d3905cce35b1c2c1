"""A segment behind others gets the ids it has in the whole text, for each kind of tokenizer."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_pipeline.tokens import Segment, Tokens
from models.common.errors import InputError
from models.spec import IGNORE_INDEX, IMAGE_TOKEN
from tests.support.shards import tiny_tokenizer

TEXT = ["a", "b", ".", "\n", "\u2581", "\u2581a", "\u2581b"]


def sentencepiece(scheme: str) -> Tokens:
    """A vocabulary as SentencePiece has it: `\u2581` for a space, which is put before the text as `scheme` says."""
    vocabulary = {piece: place for place, piece in enumerate([*TEXT, "</s>", "<unk>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[arg-type]
    backend.add_special_tokens([AddedToken("</s>"), AddedToken(IMAGE_TOKEN)])
    return Tokens(backend, "", "</s>", frozenset({"</s>", IMAGE_TOKEN}), None, backend.token_to_id(IMAGE_TOKEN))


KINDS = {
    "bytes": lambda: Tokens.of(tiny_tokenizer()),
    "always": lambda: sentencepiece("always"),
    "first": lambda: sentencepiece("first"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [["a", " b."], ["a\n", "b", "."], [" a", " a", " b"]])
def test_segments_are_the_whole_text(kind: str, texts: list[str]) -> None:
    """Where no segment ends in a special token, cutting changes no id."""
    tokens = KINDS[kind]()
    ids, _ = tokens.encode_segments([Segment(text, False) for text in texts])
    assert ids.tolist() == tokens.encode("".join(texts))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_a_prompt_do_not_depend_on_the_answer(kind: str) -> None:
    tokens = KINDS[kind]()
    prompt = [Segment("a b", False)]
    alone, _ = tokens.encode_segments(prompt)
    for answer in (" a", "b", "\na"):
        ids, labels = tokens.encode_segments([*prompt, Segment(answer, True)])
        assert ids[: len(alone)].tolist() == alone.tolist()
        assert labels[: len(alone)].tolist() == [IGNORE_INDEX] * len(alone)
        assert labels[len(alone) :].tolist() == ids[len(alone) :].tolist()


def test_behind_a_special_token_a_segment_has_the_ids_it_has_there() -> None:
    """`always` puts a space behind every special token, `first` at the very start only."""
    for scheme, expected in (("always", "\u2581a"), ("first", "a")):
        tokens = sentencepiece(scheme)
        ids, _ = tokens.encode_segments([Segment("b</s>", False), Segment("a", True)])
        assert tokens.backend.id_to_token(int(ids[-1])) == expected
        assert ids.tolist() == tokens.encode("b</s>a")


def test_empty_segments_are_nothing() -> None:
    tokens = Tokens.of(tiny_tokenizer())
    ids, labels = tokens.encode_segments([Segment("", False), Segment("a", True), Segment("", True)])
    assert ids.tolist() == labels.tolist() == tokens.encode("a")


def test_it_pickles_without_transformers() -> None:
    tokens = Tokens.of(tiny_tokenizer())
    again = pickle.loads(pickle.dumps(tokens))
    assert again.encode("a<image>b") == tokens.encode("a<image>b")
    assert (again.image_token_id, again.eos, again.bos) == (tokens.image_token_id, "<|im_end|>", "")


def test_a_token_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no token '<s>'"):
        Tokens.of(tiny_tokenizer()).token_id("<s>")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backend_tokenizer": None}, "no fast version"),
        ({"added_tokens_decoder": {}}, "lacks <image>"),
        ({"eos_token": None}, "no end-of-sequence token"),
    ],
)
def test_tokenizers_that_cannot_be_taken(change: dict[str, Any], reason: str) -> None:
    tokenizer = {"backend_tokenizer": object(), "added_tokens_decoder": {0: IMAGE_TOKEN}, "eos_token": "</s>"}
    with pytest.raises(InputError, match=reason):
        Tokens.of(SimpleNamespace(**(tokenizer | change)))
