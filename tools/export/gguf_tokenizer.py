"""A bundle's tokenizer as GGUF: pieces, types, and what decides which are merged first.

    byte-level BPE (GPT-2, Qwen, Llama 3)    merges, and llama.cpp's name of how text is split before them
    SentencePiece's BPE (Llama, Vicuna)      a score of each piece, whose order is that of the merges

llama.cpp merges any two neighbours whose union is a piece, the highest score first; `tokenizer.json` lists the pairs. A
tokenizer whose list does not come from such an order is refused. The template is not written here.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from models.common.documents import read_json
from models.common.errors import InputError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    _GPT2: "gpt-2",
    _QWEN2: "qwen2",
    _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
    f"digits {_GPT2}": "smollm",
}
"""How a tokenizer splits text before its merges -> llama.cpp's name of the same rule."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_NEVER = -1e6
"""Score of a piece that no merge makes."""


def add_tokenizer(writer: Any, bundle: Path, num_rows: int) -> None:
    """Add the tokenizer and its special tokens to a GGUFWriter.

    Args:
        num_rows: of the embeddings; those without a piece become unused ones.

    Raises:
        InputError: llama.cpp would give other ids.
    """
    stored = read_json(bundle, "tokenizer.json")
    model = stored.get("model", {})
    pre, adds_space = pre_tokenizer(stored), adds_a_space(stored)
    is_byte_level = model.get("type") == "BPE" and not model.get("byte_fallback") and pre is not None
    scores = piece_scores(model) if model.get("byte_fallback") and adds_space is not None else None
    if not is_byte_level and scores is None:
        raise InputError(
            f"{bundle}: its tokenizer cannot be exported to gguf here (byte-level BPE that splits like"
            f" {', '.join(PRE_TOKENIZERS.values())} can, and SentencePiece's BPE);"
            " llama.cpp's convert_hf_to_gguf.py knows more"
        )
    added = {entry["id"]: entry for entry in stored["added_tokens"]}
    pieces = {place: piece for piece, place in model["vocab"].items()} | {k: v["content"] for k, v in added.items()}
    unknown = model["vocab"].get(model.get("unk_token"))
    if scores is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(pieces.get(place, ""), _NEVER) for place in range(num_rows)])
        writer.add_add_space_prefix(adds_space)
        if unknown is not None:
            writer.add_unk_token_id(unknown)
    writer.add_token_list([pieces.get(place, f"[PAD{place}]") for place in range(num_rows)])
    kinds = [_UNKNOWN if place == unknown else _type_of(place, pieces, added) for place in range(num_rows)]
    writer.add_token_types(kinds)
    _add_ends(writer, bundle)


def _add_ends(writer: Any, bundle: Path) -> None:
    settings = read_json(bundle, "generation_config.json")
    ends = settings.get("eos_token_id")
    first, *others = ends if isinstance(ends, list) else [ends]
    writer.add_eos_token_id(first)
    if others:
        writer.add_eot_token_id(others[0])
    if settings.get("pad_token_id") is not None:
        writer.add_pad_token_id(settings["pad_token_id"])
    writer.add_add_bos_token(False)  # the template has it where training had


def _type_of(place: int, pieces: dict[int, str], added: dict[int, Any]) -> int:
    if place in added:
        return _CONTROL if added[place]["special"] else _USER_DEFINED
    if place not in pieces:
        return _UNUSED
    return _BYTE if len(pieces[place]) == 6 and pieces[place].startswith("<0x") else _NORMAL


def pre_tokenizer(stored: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer.json splits text; None where it has none that is known here."""
    given = stored.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    rule = ""
    for step in steps:
        if step.get("type") == "Digits" and step.get("individual_digits"):
            rule += "digits "
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            rule += step["pattern"].get("Regex", "")
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            rule += _GPT2 if step.get("use_regex", True) else ""
        else:
            return None
    return PRE_TOKENIZERS.get(rule)


def adds_a_space(stored: dict[str, Any]) -> bool | None:
    """Whether text behind a special token gets a space in front, as llama.cpp can; None: text is changed otherwise.

    Llama's old way puts one in front of every text between special tokens. Its newer way (`legacy: false`) puts one in
    front of the whole text only (`opening_space`).
    """
    normalizer, given = stored.get("normalizer") or {}, stored.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if given is None and normalizer.get("normalizers") == [{"type": "Prepend", "prepend": _SPACE}, replace]:
        return True
    for scheme, adds in (("always", True), ("first", False)):
        if given == {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}:
            return None if normalizer else adds
    return None


def opening_space(bundle: Path, template: str) -> str:
    """What a chat template begins with, so that text at the very front has the space that the tokenizer puts there.

    llama.cpp puts one behind every special token or nowhere; a prompt that begins with such a token has none.
    """
    from transformers import AutoTokenizer

    stored = read_json(bundle, "tokenizer.json")
    if adds_a_space(stored) is not False:
        return ""
    tokenizer = AutoTokenizer.from_pretrained(bundle, trust_remote_code=False)
    asked = [{"role": "user", "content": "?"}]
    prompt = str(tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False))
    return "" if prompt.startswith(tuple(tokenizer.all_special_tokens)) else "{{ ' ' }}"


def piece_scores(model: dict[str, Any]) -> dict[str, float] | None:
    """Score by piece, in the order of the merges; None where the list is not that of SentencePiece.

    Args:
        model: a tokenizer.json's, whose vocabulary falls back on bytes.
    """
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    vocabulary = model["vocab"]
    order = [piece for piece, _ in groupby(left + right for left, right in pairs)]
    ways = sum(
        piece[:cut] in vocabulary and piece[cut:] in vocabulary for piece in set(order) for cut in range(1, len(piece))
    )
    if len(set(order)) != len(order) or ways != len(set(pairs)):
        return None
    return {piece: -float(place) for place, piece in enumerate(order)}
