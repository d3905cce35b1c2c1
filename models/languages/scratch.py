"""A decoder trained from scratch: its values in a recipe. The decoder itself is `models.scratch_decoder`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator

from models.common.errors import InputError
from models.common.source import FindPart, PartFacts, read_part
from models.languages.base import LanguageConfig
from models.languages.text import make_spec
from models.spec import TextSpec


class DecoderLanguage(LanguageConfig):
    """A decoder trained from scratch: sinusoidal positions, pre-norm blocks, a vocabulary from `tokenizer`.

    `inner` is the width inside the gated MLP; by default 8/3 of the width, rounded up to a multiple of 32.
    """

    kind: Literal["decoder"] = "decoder"
    is_new: ClassVar[bool] = True
    tokenizer: str
    num_layers: PositiveInt = 24
    num_heads: PositiveInt = 8
    width: PositiveInt = 512
    inner: PositiveInt | None = None
    max_positions: PositiveInt = 2048

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> DecoderLanguage:
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width {self.width} is not a multiple of twice the {self.num_heads} heads")
        return self

    @property
    def tokenizer_path(self) -> str:
        """`tokenizer` of the recipe: another model's, all of whose tokens it has."""
        return self.tokenizer

    def facts(self, find: FindPart = read_part) -> PartFacts:
        """An equivalent of config.json; the vocabulary is that of the tokenizer's model plus the image token."""
        found = find(self.tokenizer)
        config = self._config(int(found.config["vocab_size"]) + 1)
        return PartFacts(config, f"a new decoder; its vocabulary: {found.source}", found.directory)

    def transformers_config(self, tokenizer: Any) -> Any:
        """A `ScratchDecoderConfig` with the tokenizer's whole vocabulary."""
        from models.scratch_decoder import ScratchDecoderConfig

        config = self._config(len(tokenizer))
        config.pop("model_type")
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        return ScratchDecoderConfig(**config, **ids, use_cache=False)

    def text_spec(self, tokenizer: Any, max_length: int) -> TextSpec:
        """Its special tokens; raises InputError where `max_length` is above `max_positions`."""
        if max_length > self.max_positions:
            raise InputError(f"data.max_length: {max_length} is more than model.language.max_positions")
        return make_spec(tokenizer, max_length, len(tokenizer))

    def draw(self, config: Any) -> Any:
        """A new model in evaluation mode, fp32, from torch's global generator."""
        from models.scratch_decoder import ScratchDecoderForCausalLM

        return ScratchDecoderForCausalLM(config).eval()

    def _config(self, vocab_size: int) -> dict[str, Any]:
        """The configuration in the format of config.json."""
        return {
            "model_type": "sightline_decoder",
            "vocab_size": vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.inner or -(-self.width * 8 // 96) * 32,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": True,
        }
