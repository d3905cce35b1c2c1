"""The interface of the multi-token heads' configuration, and the table of kinds. Loads without torch.

The heads share the language model's own output head; the next token is predicted by the language model itself. A new
kind is one file and one line: in MTP_HEADS, or in another package an entry point of the group `sightline.heads` (see
`models.kinds`). In recipes and in the names of weights the heads are called `future`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any

from models.kinds import KindTable
from models.shapes import LanguageShape, llama_shape
from models.spec import Config

if TYPE_CHECKING:
    from torch import nn


class MtpConfig(Config, ABC):
    """Heads for further tokens: head i, counted from 1, predicts the token i + 1 positions ahead."""

    kind: str

    @property
    @abstractmethod
    def num_drafts(self) -> int:
        """Number of heads, which is the number of tokens they propose."""

    @abstractmethod
    def build(self, layer: Any) -> nn.Module:
        """A module (states [B, L, D], next tokens' embeddings [B, L, D]) -> for each head states [B, L, D].

        Attributes `num_drafts` and `reads_next` (whether it uses the embeddings) are read from it. `layer` is the
        configuration of one layer, a `ScratchDecoderConfig`; weights are drawn by `models.mtp.heads.build_heads`.
        """

    def shape(self, language: LanguageShape) -> LanguageShape:
        """A decoder layer as wide as the language model's for each head."""
        facts = {
            "hidden_size": language.width,
            "intermediate_size": language.inner,
            "num_attention_heads": language.num_heads,
            "num_hidden_layers": self.num_drafts,
            "vocab_size": language.vocabulary,
            "tie_word_embeddings": True,
        }
        return llama_shape(facts)


MTP_HEADS = KindTable(
    "sightline.heads",
    MtpConfig,  # type: ignore[type-abstract]
    {
        "parallel": "models.mtp.parallel:ParallelFuture",
        "sequential": "models.mtp.sequential:SequentialFuture",
    },
)

MtpHeads = Annotated[MtpConfig, MTP_HEADS]
