"""The language model of a published VLM, with its tokenizer and chat template. Loads without torch."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

from models.common.errors import InputError
from models.common.source import FindPart, PartFacts, directory_of, read_part
from models.languages.base import StoredLanguage
from models.languages.text import make_spec, with_padding
from models.published.family import read_published
from models.published.image import open_published_processor
from models.spec import IMAGE_TOKEN, TextSpec

if TYPE_CHECKING:
    import torch

    from models.common.tensors import Tensors


class PublishedLanguage(StoredLanguage):
    """The language model of the VLM at `path`; `load` is the format of its frozen weights in memory."""

    kind: Literal["published"] = "published"

    def facts(self, find: FindPart = read_part) -> PartFacts:
        """The language model's part of config.json, completed by transformers' defaults."""
        found = read_published(self.path, find)
        return PartFacts(self._config(found.config).to_dict(), found.source, found.directory)

    def transformers_config(self, tokenizer: Any) -> Any:
        """Its configuration in transformers."""
        del tokenizer
        return self._config(read_published(self.path).config)

    @staticmethod
    def _config(whole: Any) -> Any:
        """Whether the head is the embedding is said outside, by which transformers goes too."""
        config = copy.deepcopy(whole.text_config)
        config.tie_word_embeddings = bool(whole.tie_word_embeddings)
        return config

    def load_tokenizer(self) -> Any:
        """The processor's tokenizer, with the chat template that the processor has."""
        found = read_published(self.path)
        processor = open_published_processor(found)
        tokenizer = copy.deepcopy(processor.tokenizer)
        if processor.chat_template is not None:
            tokenizer.chat_template = processor.chat_template
        token = self.image_token()
        of_model, of_tokenizer = found.config.image_token_id, tokenizer.convert_tokens_to_ids(token)
        if of_tokenizer != of_model:
            raise InputError(
                f"{found.source}: its image token is {of_model}, and {token} of its tokenizer is {of_tokenizer};"
                " take the tokenizer that came with the weights"
            )
        return with_padding(tokenizer, token)

    def image_token(self) -> str:
        """How its tokenizer spells the placeholder of an image."""
        return IMAGE_TOKEN

    def text_spec(self, tokenizer: Any, max_length: int) -> TextSpec:
        """Its limits from config.json, its special tokens from the tokenizer."""
        found = read_published(self.path)
        config = found.config.text_config
        context = int(getattr(config, "max_position_embeddings", max_length))
        if max_length > context:
            raise InputError(f"data.max_length: {max_length} is more than the {context} positions of {found.source}")
        return make_spec(tokenizer, max_length, int(config.vocab_size), self.image_token())

    def load_model(self, dtype: torch.dtype) -> Any:
        """Load it in `dtype`, in evaluation mode; quantized layers compute in `dtype`."""
        from transformers import AutoModelForCausalLM

        import models.scratch_decoder  # noqa: F401 - makes its configuration known
        from models.languages import nf4
        from models.languages.pretrained import ADVICE, quantization_options
        from models.loading import load_from_tensors

        config = self.transformers_config(None)
        model = load_from_tensors(
            AutoModelForCausalLM._model_mapping[type(config)],
            config,
            self.tensors(),
            directory_of(self.path),
            advice=ADVICE,
            dtype=dtype,
            attn_implementation="sdpa",
            **quantization_options(self.load, dtype, config, self.path),
        )
        model.config.use_cache = False  # a cache switches off the detection of packed rows
        nf4.keep_order(model)
        return model.eval()

    def tensors(self) -> Tensors:
        """See `LanguageConfig.tensors`."""
        from models.published.weights import tensors_of_part

        return tensors_of_part(directory_of(self.path), "language")

    def published_dtype(self) -> str | None:
        """`dtype` of its config.json."""
        config = read_published(self.path).config
        found = getattr(config, "dtype", None) or getattr(config.text_config, "dtype", None)
        return None if found is None else str(found).removeprefix("torch.")
