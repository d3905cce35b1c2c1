"""Q-Former (Li et al. 2023, BLIP-2, section 3.1) over DistilBERT's layers: learned queries that attend to an image.

    queries --+-- self-attention --+-- cross-attention to the image -- feed forward --> see: [T, Q, W] --adapter--> LM
              |   (shared)         |
    text -----+--------------------+------------------------- its own feed forward --> read: [N, L, W]

Owns the queries, the layers, and how queries and text attend to each other. Parameters with `text` in their names are
for training on image-text pairs only (`models.projectors.qformer_text`) and are not part of a bundle. There is no
dropout, so that a batch's results do not depend on how it is split over ranks.

T tiles or N pairs, P features a tile, V the encoder's width, Q queries, L text positions, W the Q-Former's width, D the
language model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from models.common.errors import InputError
from models.common.source import FindPart, directory_of, read_part
from models.projectors.attention import Attention, LearnedQueries
from models.projectors.base import ProjectorConfig, TextEncoder
from models.projectors.mlp import Mlp, MlpProjector
from models.projectors.qformer_text import NORM_EPSILON, TextSide
from models.shapes import Linear, PairShape, ProjectorShape, attention_linears


class QFormerProjector(ProjectorConfig):
    """Learned queries that read the image through cross-attention, then an MLP to the language model's width.

    Layers 0, n, 2n, ... of the text encoder at `path` have cross-attention, n being `cross_attention_every`: 2 is
    BLIP-2's. Images and texts are compared in `joint_width` dimensions.
    """

    kind: Literal["qformer"] = "qformer"
    path: str
    """The text encoder whose layers it starts from (DistilBERT)."""
    num_queries: PositiveInt = 32
    cross_attention_every: PositiveInt = 1
    joint_width: PositiveInt = 256
    adapter: MlpProjector = MlpProjector()

    @property
    def text_encoder(self) -> TextEncoder:
        """The one at `path`; the queries take the image's place in a row, and have no text positions."""
        return TextEncoder(self.path, self.num_queries)

    def num_tokens(self, num_features: int) -> int:
        """The number of queries, whatever the number of features."""
        del num_features
        return self.num_queries

    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """A `QFormer` with the shape of the text encoder at `path`, with its image side and its text side."""
        return QFormer(self, vision_width, language_width, find(self.path).config)

    def load_pretrained(self, projector: nn.Module) -> None:
        """Load the weights of the text encoder at `path`."""
        cast("QFormer", projector).start_from(directory_of(self.path))

    def shape(
        self, vision_width: int, language_width: int, num_features: int, find: FindPart = read_part
    ) -> ProjectorShape:
        """The matrices from an image to image tokens, without the text side."""
        text = find(self.path).config
        width, inner, features = int(text["dim"]), int(text["hidden_dim"]), num_features / self.num_queries
        linears: list[Linear] = []
        for number in range(int(text["n_layers"])):
            linears += attention_linears(width, width, 1.0)
            if number % self.cross_attention_every == 0:
                linears += attention_linears(width, vision_width, features)
            linears += [Linear("up", width, inner), Linear("down", inner, width)]
        return ProjectorShape((*linears, *self.adapter.shape(width, language_width, self.num_queries).linears))

    def pair_shape(self, vision_width: int, num_features: int, find: FindPart = read_part) -> PairShape:
        """Both sides, without the adapter."""
        text = find(self.path).config
        num_layers = int(text["n_layers"])
        return PairShape(
            width=int(text["dim"]),
            inner=int(text["hidden_dim"]),
            num_layers=num_layers,
            num_cross=-(-num_layers // self.cross_attention_every),
            num_queries=self.num_queries,
            num_features=num_features,
            vision_width=vision_width,
            joint_width=self.joint_width,
            vocabulary=int(text["vocab_size"]),
        )

    def export_tensors(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All weights but the text side's, which are only needed in training."""
        yield from ((name, value) for name, value in weights.items() if ".text." not in f".{name}")

    def export_config(self) -> dict[str, Any]:
        """Its values and the text encoder's config.json, so that a bundle does not need that encoder's directory."""
        return {**super().export_config(), "projector_text": dict(read_part(self.path).config)}

    def build_exported(self, vision_width: int, language_width: int, exported: Any) -> nn.Module:
        """A `QFormer` without the text side."""
        return QFormer(self, vision_width, language_width, exported.projector_text, with_text=False)


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
        self.queries = LearnedQueries(config.num_queries, width)
        self.query_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.vision_norm = nn.LayerNorm(vision_width)
        self.blocks = nn.ModuleList(
            Block(width, inner, heads, vision_width if number % config.cross_attention_every == 0 else None, with_text)
            for number in range(int(facts["n_layers"]))
        )
        self.text = TextSide(facts, config.joint_width) if with_text else None
        self.adapter = Mlp(width, language_width)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Image tokens [T, Q, D]."""
        tokens: Tensor = self.adapter(self.see(features_TPV))
        return tokens

    def see(self, features_TPV: Tensor) -> Tensor:
        """The queries' states after attending to the image, without text, [T, Q, W]."""
        queries_TQW, image_TPV = self._begin(features_TPV)
        for block in self.blocks:
            queries_TQW, _ = block(queries_TQW, None, image_TPV, None)
        return queries_TQW

    def read(self, ids_NL: Tensor, is_text_NL: Tensor) -> Tensor:
        """The text's states without its image, [N, L, W]; padding is masked."""
        assert self.text is not None
        text_NLW = self.text.embed(ids_NL)
        may_see = is_text_NL.unsqueeze(1).expand(-1, ids_NL.shape[1], -1)
        for block in self.blocks:
            _, text_NLW = block(None, text_NLW, None, may_see)
        return text_NLW

    def match(self, features_NPV: Tensor, ids_NL: Tensor, is_text_NL: Tensor) -> Tensor:
        """The queries [N, Q, W] where queries and text attend to each other (image-text matching)."""
        sees_queries = is_text_NL.new_ones(len(ids_NL), self.num_queries)
        may_see = torch.cat([sees_queries, is_text_NL], dim=1).unsqueeze(1)
        return self._together(features_NPV, ids_NL, may_see, starts=False)[0]

    def caption(self, features_NPV: Tensor, ids_NL: Tensor, is_text_NL: Tensor) -> Tensor:
        """The text [N, L, W]: tokens attend to the queries and to tokens up to themselves, queries only to each other.

        The first position is replaced by the decoder's start embedding.
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
        queries_NQW, image_NPV = self._begin(features_NPV)
        text_NLW = self.text.embed(ids_NL, starts=starts)
        for block in self.blocks:
            queries_NQW, text_NLW = block(queries_NQW, text_NLW, image_NPV, may_see)
        return queries_NQW, text_NLW

    def start_from(self, directory: Path) -> None:
        """Load DistilBERT's weights; the queries' feed-forwards start as copies of the text's."""
        from models.common.sharded import TensorFiles

        files = TensorFiles.open(directory)
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
    """BERT's feed-forward: linear, GELU, linear, and a norm over the residual sum."""

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
    """From queries to an image's features, with a norm over the residual sum."""

    def __init__(self, width: int, vision_width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, vision_width, num_heads)
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """[N, Q, W]."""
        after: Tensor = self.norm(queries + self.attention(queries, image))
        return after


class Block(nn.Module):
    """One layer: joint self-attention, cross-attention of queries to the image, feed-forwards for queries and text."""

    def __init__(self, width: int, inner: int, num_heads: int, vision_width: int | None, with_text: bool) -> None:
        super().__init__()
        self.attention = Attention(width, width, num_heads)
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.cross_attention = None if vision_width is None else CrossAttention(width, vision_width, num_heads)
        self.feed_forward = FeedForward(width, inner)
        self.text = FeedForward(width, inner) if with_text else None

    def forward(
        self, queries: Tensor | None, text: Tensor | None, image: Tensor | None, may_see: Tensor | None
    ) -> tuple[Any, Any]:
        """Queries [N, Q, W] and text [N, L, W] after this layer; either may be absent."""
        states = torch.cat([part for part in (queries, text) if part is not None], dim=1)
        states = self.attention_norm(states + self.attention(states, states, may_see))
        num_queries = 0 if queries is None else queries.shape[1]
        if queries is not None:
            queries = states[:, :num_queries]
            if self.cross_attention is not None:
                queries = self.cross_attention(queries, image)
            queries = self.feed_forward(queries)
        if text is not None:
            assert self.text is not None
            text = self.text(states[:, num_queries:])
        return queries, text

    def start_from(self, copy: Any, layer: str) -> None:
        """Load the weights of one DistilBERT layer."""
        for name in ("query", "key", "value", "output"):
            copy(getattr(self.attention, name), f"{layer}.attention.{'out' if name == 'output' else name[0]}_lin")
        copy(self.attention_norm, f"{layer}.sa_layer_norm")
        for feed_forward in (self.feed_forward, self.text):
            if feed_forward is not None:
                copy(feed_forward.up, f"{layer}.ffn.lin1")
                copy(feed_forward.down, f"{layer}.ffn.lin2")
                copy(feed_forward.norm, f"{layer}.output_layer_norm")
