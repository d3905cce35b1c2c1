"""The shapes of a model's matrices, as its parts give them, from which FLOPs and memory are computed. Loads without
torch.

Owns the values, and the shapes that several parts have in common. Does not own what a part's own shape is (the part
itself gives it) or what shapes cost (`trainer.flops`, `tools.preflight`). Widths are numbers of features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer up to the layer whose hidden states are the features; layers after it are not needed."""

    width: int
    inner: int
    num_layers: int
    """Layers that a forward needs."""
    num_patches: int
    num_leading_tokens: int
    patch_inputs: int
    """Values of a patch: 3 x side x side; at native resolution of two frames."""
    patch_size: int
    """The side, in pixels."""

    @property
    def num_tokens(self) -> int:
        """Positions in a tile's attention."""
        return self.num_patches + self.num_leading_tokens

    @property
    def layer_weights(self) -> int:
        """Matrix elements that a token is multiplied with in one layer: q, k, v, o and the two of the MLP."""
        return 4 * self.width**2 + 2 * self.width * self.inner

    @property
    def inner_activations(self) -> int:
        """Tensors of the inner width that autograd keeps of an MLP."""
        return 2

    def attention_pairs(self, counts: Counts) -> float:
        """Pairs of positions that attend to each other, of all layers together."""
        return counts.tiles * self.num_tokens**2 * self.num_layers


@dataclass(frozen=True, kw_only=True)
class PatchShape(VisionShape):
    """A tower of native resolution, whose tiles are patches: how many attend to each other depends on the images."""

    num_whole: int
    """Layers in which a patch attends to its whole image; in the others to its window."""
    is_gated: bool
    """Whether an MLP has three matrices."""

    @property
    def layer_weights(self) -> int:
        """See `VisionShape.layer_weights`."""
        return 4 * self.width**2 + (3 if self.is_gated else 2) * self.width * self.inner

    @property
    def inner_activations(self) -> int:
        """See `VisionShape.inner_activations`."""
        return 4 if self.is_gated else 2

    def attention_pairs(self, counts: Counts) -> float:
        """See `VisionShape.attention_pairs`."""
        return counts.image_pairs * self.num_whole + counts.window_pairs * (self.num_layers - self.num_whole)


@dataclass(frozen=True)
class Linear:
    """A matrix that every row of its part is multiplied with: (inputs, outputs), and its name in LoRA's `targets`."""

    name: str
    inputs: int
    outputs: int
    per_token: float = 1.0
    """Rows per image token, for a projector that makes fewer tokens than it gets features."""

    @property
    def weights(self) -> int:
        """Number of elements."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ProjectorShape:
    """Matrices of a projector, in order; attention itself is left out, since with few queries its cost is small."""

    linears: tuple[Linear, ...]

    @property
    def weights(self) -> float:
        """Matrix elements that rows are multiplied with for one image token."""
        return sum(linear.weights * linear.per_token for linear in self.linears)


@dataclass(frozen=True)
class LanguageShape:
    """A decoder: the linears of one layer, how many layers, and its head over the vocabulary."""

    width: int
    inner: int
    num_layers: int
    num_heads: int
    query_width: int
    """All query heads side by side."""
    key_width: int
    vocabulary: int
    layer_linears: tuple[Linear, ...]
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Matrix elements that a token is multiplied with in one layer."""
        return sum(linear.weights for linear in self.layer_linears)


@dataclass(frozen=True)
class PairShape:
    """A projector that is trained on image-text pairs (a Q-Former): its layers and their inputs."""

    width: int
    inner: int
    num_layers: int
    num_cross: int
    """Layers with cross-attention to the image."""
    num_queries: int
    num_features: int
    vision_width: int
    joint_width: int
    """In which images and texts are compared."""
    vocabulary: int


@dataclass(frozen=True)
class ModelShape:
    """The parts; a tile gives `features_per_tile` image tokens."""

    vision: VisionShape
    projector: ProjectorShape
    language: LanguageShape
    features_per_tile: int
    mtp: LanguageShape | None = None
    """Heads for further tokens: a layer each, after the language model's last."""
    pairs: PairShape | None = None
    """Of a projector that reads text, in a stage without the language model."""


def attention_linears(width: int, source_width: int, sources: float) -> tuple[Linear, ...]:
    """Attention of BERT's kind; `sources` positions are attended to by each query."""
    keys = tuple(Linear(name, source_width, width, sources) for name in ("key", "value"))
    return (*keys, Linear("query", width, width), Linear("output", width, width))


def llama_shape(facts: Mapping[str, Any]) -> LanguageShape:
    """Of a Llama-like config.json: gated MLP, keys and values of one head for several of queries.

    Raises KeyError where a field is missing.
    """
    width, inner, heads = int(facts["hidden_size"]), int(facts["intermediate_size"]), int(facts["num_attention_heads"])
    head = int(facts.get("head_dim") or width // heads)
    query, key = heads * head, int(facts.get("num_key_value_heads") or heads) * head
    linears = (
        Linear("q_proj", width, query),
        Linear("k_proj", width, key),
        Linear("v_proj", width, key),
        Linear("o_proj", query, width),
        Linear("gate_proj", width, inner),
        Linear("up_proj", width, inner),
        Linear("down_proj", inner, width),
    )
    return LanguageShape(
        width=width,
        inner=inner,
        num_layers=int(facts["num_hidden_layers"]),
        num_heads=heads,
        query_width=query,
        key_width=key,
        vocabulary=int(facts["vocab_size"]),
        layer_linears=linears,
        tied=bool(facts.get("tie_word_embeddings", False)),
    )


@dataclass(frozen=True)
class Counts:
    """Images, tokens and targets of some rows, padding excluded."""

    tokens: float
    targets: float
    tiles: float
    causal_pairs: float
    """Pairs (position, position at or before it) within samples: n (n + 1) / 2 for a sample of n tokens."""
    target_pairs: float
    """Those whose first position carries a target."""
    image_pairs: float = 0.0
    """At native resolution, pairs of patches of the same image."""
    window_pairs: float = 0.0
    """At native resolution, pairs of patches of the same window."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @classmethod
    def of_sample(cls, tokens: float, targets: float, tiles: float) -> Counts:
        """One sample alone, whose targets are its last positions; patches are of one image without windows."""
        pairs = tokens * (tokens + 1) / 2
        others = tokens - targets
        return cls(tokens, targets, tiles, pairs, pairs - others * (others + 1) / 2, tiles**2, tiles**2)

    def times(self, count: float) -> Counts:
        """So many of it."""
        return Counts(*(count * getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part, by purpose."""

    forward: float = 0.0
    to_activations: float = 0.0
    to_weights: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.to_activations + self.to_weights

    def __add__(self, other: PartFlops) -> PartFlops:
        return PartFlops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))
