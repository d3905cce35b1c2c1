"""Q-Former (Li et al. 2023, BLIP-2, section 3.1) over DistilBERT's layers: learnt queries that read a picture.

    queries --+-- self-attention --+-- cross-attention to the picture -- feed forward --> see: [T, Q, W] --adapter--> LM
              |   (shared)         |
    text -----+--------------------+------------------------- its own feed forward --> read: [N, L, W]

Owns the queries, the layers, and how queries and text see each other. What stands under `text` anywhere in the names is
for training by pictures and texts alone (`models.projectors.qformer_text`) and is not part of a bundle. Dropout is left
out: a batch's numbers then do not depend on how it is split over ranks.

T tiles or N pairs, P features a tile, V the encoder's width, Q queries, L text positions, W the Q-Former's width, D the
language model's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.config import QFormerProjector
from models.errors import InputError
from models.projectors.attention import Attention, Learnt
from models.projectors.qformer_text import TextSide
from models.projectors.simple import Mlp

NORM_EPSILON = 1e-12
"""BERT's."""


class QFormer(nn.Module):
    """`facts` is the config.json of the text encoder (DistilBERT) whose shape it has."""

    def __init__(
        self,
        config: QFormerProjector,
        vision_width: int,
        language_width: int,
        facts: Mapping[str, Any],
        *,
        with_text: bool = True,
    ) -> None:
        super().__init__()
        if "n_layers" not in facts:
            raise InputError(f"model.projector.path: {config.path} is a {facts.get('model_type')}, not a DistilBERT")
        width, inner, heads = int(facts["dim"]), int(facts["hidden_dim"]), int(facts["n_heads"])
        self.num_queries = config.num_queries
        self.queries = Learnt(config.num_queries, width)
        self.query_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.vision_norm = nn.LayerNorm(vision_width)
        self.blocks = nn.ModuleList(
            Block(width, inner, heads, vision_width if number % config.cross_attention_every == 0 else None, with_text)
            for number in range(int(facts["n_layers"]))
        )
        self.text = TextSide(facts, config.joint_width) if with_text else None
        self.adapter = Mlp(config.adapter, width, language_width)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Image tokens [T, Q, D]."""
        tokens: Tensor = self.adapter(self.see(features_TPV))
        return tokens

    def see(self, features_TPV: Tensor) -> Tensor:
        """What the queries make of the picture without any text, [T, Q, W]."""
        queries_TQW, picture_TPV = self._begin(features_TPV)
        for block in self.blocks:
            queries_TQW, _ = block(queries_TQW, None, picture_TPV, None)
        return queries_TQW

    def read(self, ids_NL: Tensor, is_text_NL: Tensor) -> Tensor:
        """What the layers make of a text without its picture, [N, L, W]; padding is not seen."""
        assert self.text is not None
        text_NLW = self.text.embed(ids_NL)
        may_see = is_text_NL.unsqueeze(1).expand(-1, ids_NL.shape[1], -1)
        for block in self.blocks:
            _, text_NLW = block(None, text_NLW, None, may_see)
        return text_NLW

    def match(self, features_NPV: Tensor, ids_NL: Tensor, is_text_NL: Tensor) -> Tensor:
        """The queries [N, Q, W] where picture and text see each other (image-text matching)."""
        sees_queries = is_text_NL.new_ones(len(ids_NL), self.num_queries)
        may_see = torch.cat([sees_queries, is_text_NL], dim=1).unsqueeze(1)
        return self._together(features_NPV, ids_NL, may_see, starts=False)[0]

    def caption(self, features_NPV: Tensor, ids_NL: Tensor, is_text_NL: Tensor) -> Tensor:
        """The text [N, L, W] where each word sees the queries and the words up to itself, the queries only each other.

        The first position is replaced by the decoder's own start.
        """
        num_queries, length = self.num_queries, ids_NL.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=ids_NL.device).tril()
        may_see = is_text_NL.new_zeros(len(ids_NL), num_queries + length, num_queries + length)
        may_see[:, :, :num_queries] = True
        may_see[:, num_queries:, num_queries:] = causal_LL & is_text_NL.unsqueeze(1)
        return self._together(features_NPV, ids_NL, may_see, starts=True)[1]

    def _begin(self, features_TPV: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(self.queries(len(features_TPV))), self.vision_norm(features_TPV)

    def _together(
        self, features_NPV: Tensor, ids_NL: Tensor, may_see: Tensor, *, starts: bool
    ) -> tuple[Tensor, Tensor]:
        assert self.text is not None
        queries_NQW, picture_NPV = self._begin(features_NPV)
        text_NLW = self.text.embed(ids_NL, starts=starts)
        for block in self.blocks:
            queries_NQW, text_NLW = block(queries_NQW, text_NLW, picture_NPV, may_see)
        return queries_NQW, text_NLW

    def start_from(self, directory: Path) -> None:
        """Take DistilBERT's weights; the queries' feed-forwards start as copies of the text's."""
        from models.sharded import TensorFiles

        files = TensorFiles(directory)
        prefix = "distilbert." if "distilbert.embeddings.word_embeddings.weight" in files else ""
        taken = {name.removeprefix(prefix): name for name in files}

        def copy(module: nn.Module, name: str) -> None:
            for key, parameter in module.named_parameters(recurse=False):
                if f"{name}.{key}" not in taken:
                    raise InputError(f"{directory}: no tensor {name}.{key} in it; a DistilBERT is expected")
                parameter.data.copy_(files.read(taken[f"{name}.{key}"]))

        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.start_from(copy, f"transformer.layer.{number}")
        copy(self.query_norm, "embeddings.LayerNorm")
        if self.text is not None:
            self.text.start_from(copy, has_head="vocab_transform.weight" in taken)


class FeedForward(nn.Module):
    """BERT's: wider, GELU, back, and a norm over the sum."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)

    def forward(self, states: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        after: Tensor = self.norm(states + self.down(self.activation(self.up(states))))
        return after


class CrossAttention(nn.Module):
    """From queries to a picture's features, with a norm over the sum."""

    def __init__(self, width: int, vision_width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, vision_width, num_heads)
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)

    def forward(self, queries: Tensor, picture: Tensor) -> Tensor:
        """[N, Q, W]."""
        after: Tensor = self.norm(queries + self.attention(queries, picture))
        return after


class Block(nn.Module):
    """One layer: self-attention over queries and text, the queries' look at the picture, a feed-forward for each."""

    def __init__(self, width: int, inner: int, num_heads: int, vision_width: int | None, with_text: bool) -> None:
        super().__init__()
        self.attention = Attention(width, width, num_heads)
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.cross_attention = None if vision_width is None else CrossAttention(width, vision_width, num_heads)
        self.feed_forward = FeedForward(width, inner)
        self.text = FeedForward(width, inner) if with_text else None

    def forward(
        self, queries: Tensor | None, text: Tensor | None, picture: Tensor | None, may_see: Tensor | None
    ) -> tuple[Any, Any]:
        """Queries [N, Q, W] and text [N, L, W] after this layer; either may be absent."""
        states = torch.cat([part for part in (queries, text) if part is not None], dim=1)
        states = self.attention_norm(states + self.attention(states, states, may_see))
        num_queries = 0 if queries is None else queries.shape[1]
        if queries is not None:
            queries = states[:, :num_queries]
            if self.cross_attention is not None:
                queries = self.cross_attention(queries, picture)
            queries = self.feed_forward(queries)
        if text is not None:
            assert self.text is not None
            text = self.text(states[:, num_queries:])
        return queries, text

    def start_from(self, copy: Any, layer: str) -> None:
        """Take one layer of DistilBERT."""
        for name in ("query", "key", "value", "output"):
            copy(getattr(self.attention, name), f"{layer}.attention.{'out' if name == 'output' else name[0]}_lin")
        copy(self.attention_norm, f"{layer}.sa_layer_norm")
        for feed_forward in (self.feed_forward, self.text):
            if feed_forward is not None:
                copy(feed_forward.up, f"{layer}.ffn.lin1")
                copy(feed_forward.down, f"{layer}.ffn.lin2")
                copy(feed_forward.norm, f"{layer}.output_layer_norm")
