"""A causal language model that transformers loads. Imports torch and transformers only to load one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from models.common.documents import read_json
from models.common.source import FindPart, PartFacts, directory_of, read_part
from models.languages import nf4
from models.languages.base import FrozenFormat, StoredLanguage
from models.languages.text import text_spec
from models.loading import load_whole, opening
from models.spec import TextSpec

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ADVICE = "fetch or copy it again"


class PretrainedLanguage(StoredLanguage):
    """A causal language model that `transformers` loads from `path` (a local directory or a hub name).

    `load` is the format of its frozen weights in memory: `nf4` and `int8` (bitsandbytes) train a 7B on a small GPU.
    """

    kind: Literal["pretrained"] = "pretrained"

    def facts(self, find: FindPart = read_part) -> PartFacts:
        """The config.json and directory of `path`, downloaded if necessary."""
        return find(self.path)

    def transformers_config(self, tokenizer: Any) -> Any:
        """The configuration in `path`, read by transformers' `AutoConfig`."""
        from transformers import AutoConfig

        del tokenizer
        directory = directory_of(self.path)
        with opening(directory, "is not understood", ADVICE):
            return AutoConfig.from_pretrained(directory, trust_remote_code=False)

    def text_spec(self, tokenizer: Any, max_length: int) -> TextSpec:
        """Its limits from config.json, its special tokens from the tokenizer."""
        return text_spec(self.path, tokenizer, max_length)

    def load_model(self, dtype: torch.dtype) -> Any:
        """Load it in `dtype`, in evaluation mode; quantized layers compute in `dtype`."""
        from transformers import AutoModelForCausalLM

        config = self.transformers_config(None) if self.load == "nf4" else None
        model = load_whole(
            AutoModelForCausalLM.from_pretrained,
            directory_of(self.path),
            advice=ADVICE,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            **quantization_options(self.load, dtype, config, self.path),
        )
        model.config.use_cache = False  # a cache switches off the detection of packed rows
        nf4.keep_order(model)
        return model.eval()

    def published_dtype(self) -> str | None:
        """`dtype` of its config.json; older files call it `torch_dtype`."""
        facts = read_json(directory_of(self.path), "config.json")
        found = facts.get("dtype") or facts.get("torch_dtype")
        return None if found is None else str(found)


def quantization_options(load: FrozenFormat, dtype: torch.dtype, config: Any, path: str) -> dict[str, Any]:
    """What `from_pretrained` needs beside the weights to hold them in `load`; nothing for `full`.

    Args:
        config: the language model's, needed for `nf4` alone.
        path: names the model in the log.
    """
    if load == "full":
        return {}
    skip = _kept_whole(config, path) if load == "nf4" else None
    return {"quantization_config": quantization(load, dtype, skip=skip), "device_map": "cpu"}


def _kept_whole(config: Any, path: str) -> list[str] | None:
    """The modules that NF4 leaves whole; None, which leaves it to transformers, where it can hold all others."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    always = list(get_keys_to_not_convert(model))
    whole = nf4.layers_left_whole(model, always)
    if not whole:
        return None
    log.info("%s: %s", path, nf4.told(whole))
    return [*always, *whole]


def quantization(load: str, dtype: torch.dtype, skip: list[str] | None = None) -> Any:
    """bitsandbytes' settings for `nf4` or `int8`; `skip` lists modules that are not quantized, by their full name."""
    from transformers import BitsAndBytesConfig

    if load == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skip,
    )
