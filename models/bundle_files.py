"""Writes a bundle's JSON files, so that transformers 5 and 4.57 read the same model and the same prompts out of them.

`save_pretrained` alone is not enough: it leaves out on which side prompts are padded, names classes and keys that older
versions do not know, and writes down where the parts lay on the machine that made the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.common.documents import read_json
from models.common.files import write_json

_OF_THE_MAKER = ("is_local", "_name_or_path", "name_or_path", "local_files_only", "backend", "auto_map")
"""Keys that tell of the machine or the process that wrote a file; `auto_map` would ask a reader to run code."""


def save_processor(processor: Any, directory: Path) -> None:
    """Write the tokenizer's, the image processor's and the chat template's files.

    Prompts of several lengths are padded on the left, so that no answer follows on padding. The class of a fast
    tokenizer is the general one, which takes tokenizer.json as it is, in every version.
    """
    is_fast = bool(getattr(processor.tokenizer, "is_fast", False))
    processor.tokenizer.padding_side = "left"
    processor.save_pretrained(directory)
    config = _without_maker(read_json(directory, "tokenizer_config.json"))
    config["padding_side"] = "left"
    config["model_input_names"] = ["input_ids", "attention_mask"]  # 4.57 would add token_type_ids
    if is_fast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4.57 takes a mapping under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(directory / "tokenizer_config.json", config)


def save_config(config: Any, directory: Path) -> None:
    """Write config.json."""
    config.save_pretrained(directory)
    write_json(directory / "config.json", _for_older_versions(_without_maker(read_json(directory, "config.json"))))


def copy_config(source: Path, directory: Path, changes: Mapping[str, Any]) -> None:
    """Write the config.json of the model in `source`, with other values of some keys, in its own layout."""
    values = _for_older_versions(_without_maker(read_json(source, "config.json")))
    write_json(directory / "config.json", {**values, **changes})


def _for_older_versions(values: Any) -> Any:
    """The same values with `rope_theta` and `rope_scaling`, which 4.57 reads, beside version 5's `rope_parameters`."""
    if not isinstance(values, dict):
        return values
    values = {key: _for_older_versions(value) for key, value in values.items()}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if scaling.get("rope_type", "default") != "default" or len(scaling) > 1:  # M-RoPE's sections
            values["rope_scaling"] = scaling
    return values


def _without_maker(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _without_maker(value) for key, value in values.items() if key not in _OF_THE_MAKER}
