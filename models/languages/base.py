"""The interface of a language model's configuration, and the table of kinds. Loads without torch.

A new kind is one file and one line: in LANGUAGES, or in another package an entry point of the group
`sightline.languages` (see `models.kinds`). Does not own adapters (the trainer adds them) or prompts (the data
pipeline writes them).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from models.common.source import FindPart, PartFacts, check_weights, digest_of, directory_of, read_part
from models.kinds import KindTable
from models.shapes import LanguageShape, llama_shape
from models.spec import Config, TextSpec

if TYPE_CHECKING:
    import torch

    from models.common.tensors import Tensors

FrozenFormat = Literal["full", "nf4", "int8"]
"""The format of frozen weights in memory: unquantized, or in 4 or 8 bits by bitsandbytes."""


class LanguageConfig(Config, ABC):
    """A causal decoder of transformers, or one with the same structure."""

    kind: str
    is_new: ClassVar[bool] = False
    """Whether it starts from random weights, so that every checkpoint must hold all of it."""

    @property
    @abstractmethod
    def tokenizer_path(self) -> str:
        """The tokenizer's local directory or hub name."""

    @property
    def frozen_format(self) -> FrozenFormat:
        """The format of its frozen weights in memory."""
        return "full"

    @abstractmethod
    def facts(self, find: FindPart = read_part) -> PartFacts:
        """Its config.json, or an equivalent for a new model; no weight is read."""

    def check_weights(self, find: FindPart = read_part) -> None:
        """Raise InputError where its pretrained weights are not there, as far as that shows without reading them."""
        del find

    @abstractmethod
    def transformers_config(self, tokenizer: Any) -> Any:
        """Its configuration in transformers; a new model's vocabulary has all of the tokenizer's tokens."""

    @abstractmethod
    def text_spec(self, tokenizer: Any, max_length: int) -> TextSpec:
        """Its limits and special tokens; raises InputError where `max_length` is longer than its context."""

    def load_tokenizer(self) -> Any:
        """Its tokenizer, with the image token and a padding token."""
        from models.languages.text import load_tokenizer

        return load_tokenizer(self.tokenizer_path)

    def tensors(self) -> Tensors | None:
        """Its pretrained weights by their names in its class; None: as they lie in `weights_directory`, if anywhere."""
        return None

    def load_model(self, dtype: torch.dtype) -> Any:
        """The pretrained model in `dtype`, in evaluation mode; None where it is new."""
        del dtype
        return None

    def draw(self, config: Any) -> Any:
        """A new model by `transformers_config`, in fp32, from torch's global generator; None where it is pretrained."""
        del config
        return None

    def weights_directory(self) -> Path | None:
        """The directory of its pretrained weights; None where it is new."""
        return None

    def weights_digest(self) -> str | None:
        """The sha256 of its pretrained weights, by which a checkpoint recognises them; None where it is new."""
        directory = self.weights_directory()
        return None if directory is None else digest_of(directory)

    def published_dtype(self) -> str | None:
        """The dtype that its publishers trained it in, such as "bfloat16"; None where it is new or that is unknown."""
        return None

    def shape(self, find: FindPart = read_part) -> LanguageShape:
        """Widths, layers and vocabulary; raises KeyError where its config.json lacks a field."""
        return llama_shape(self.facts(find).config)


class StoredLanguage(LanguageConfig):
    """A causal language model whose weights lie at `path`; `load` is the format of its frozen weights in memory."""

    path: str
    load: FrozenFormat = "full"

    @property
    def tokenizer_path(self) -> str:
        """`path`: the tokenizer is in the same directory as the weights."""
        return self.path

    @property
    def frozen_format(self) -> FrozenFormat:
        """`load` of the recipe."""
        return self.load

    def check_weights(self, find: FindPart = read_part) -> None:
        """Raise InputError where the directory of `path` is here without weights."""
        check_weights(self.facts(find))

    def weights_directory(self) -> Path:
        """The directory of `path`, downloaded where that is a hub name."""
        return directory_of(self.path)


LANGUAGES = KindTable(
    "sightline.languages",
    LanguageConfig,  # type: ignore[type-abstract]
    {
        "pretrained": "models.languages.pretrained:PretrainedLanguage",
        "decoder": "models.languages.scratch:DecoderLanguage",
    },
)

Language = Annotated[LanguageConfig, LANGUAGES]
