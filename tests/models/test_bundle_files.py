"""A bundle's JSON files hold what transformers 5 and 4.57 need, and a tokenizer read back gives the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.bundle_files import save_config, save_processor
from tests.support.paths import data, needs_data


class Pair:
    """As much of a processor as saving needs."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def save_pretrained(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)


@needs_data
@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_ids_of_a_real_tokenizer_are_the_same_when_read_back(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece" if name == "llama2" else "tokenizers")
    from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

    folder = data("tokenizers", "reference_ids.jsonl").parent
    tokenizer = {"llama2": LlamaTokenizer, "qwen2": Qwen2Tokenizer}[name].from_pretrained(folder / name)
    save_processor(Pair(tokenizer), tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [json.loads(line)["text"] for line in (folder / "reference_ids.jsonl").read_text().split("\n") if line]
    assert [again(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert again.padding_side == "left"
    assert again.eos_token == tokenizer.eos_token
    assert again.bos_token == tokenizer.bos_token


@pytest.mark.parametrize(
    ("given", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, None),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}, {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_positions_are_written_for_both_versions(given: dict[str, Any], scaling: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaConfig

    config = LlamaConfig(rope_parameters=given)
    config._name_or_path = "/home/somebody/model"
    save_config(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == given["rope_theta"]
    assert written.get("rope_scaling") == scaling
    assert "_name_or_path" not in written
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
