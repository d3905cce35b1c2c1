"""The Q-Former's text side: embeddings, and the heads of BLIP-2's three losses. Only needed in training.

N pairs, L positions, Q queries, W width, E the width in which images and texts are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.projectors.attention import LearnedQueries

NORM_EPSILON = 1e-12
INITIAL_TEMPERATURE, LARGEST_SCALE = 0.07, 100.0
"""CLIP's: similarities are divided by a trained temperature, and never multiplied by more than 100."""


class TextSide(nn.Module):
    """Token and position embeddings, and one head for each loss. `facts` is DistilBERT's config.json."""

    def __init__(self, facts: Mapping[str, Any], joint_width: int) -> None:
        super().__init__()
        width = int(facts["dim"])
        self.words = nn.Embedding(int(facts["vocab_size"]), width)
        self.positions = nn.Embedding(int(facts["max_position_embeddings"]), width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.contrast = Contrast(width, joint_width)
        self.matching = nn.Linear(width, 2)
        self.captioning = Captioning(width, self.words)

    def embed(self, ids_NL: Tensor, *, starts: bool = False) -> Tensor:
        """Embeddings [N, L, W]; with `starts` the first position is the decoder's start embedding, not the text's."""
        words_NLW = self.words(ids_NL)
        if starts:
            words_NLW = torch.cat([self.captioning.start(len(ids_NL)), words_NLW[:, 1:]], dim=1)
        places_L = torch.arange(ids_NL.shape[1], device=ids_NL.device)
        embedded: Tensor = self.norm(words_NLW + self.positions(places_L))
        return embedded

    def start_from(self, copy: Any, *, has_head: bool) -> None:
        """Load DistilBERT's embeddings, and its masked-word head where the files have one."""
        copy(self.words, "embeddings.word_embeddings")
        copy(self.positions, "embeddings.position_embeddings")
        copy(self.norm, "embeddings.LayerNorm")
        if has_head:
            copy(self.captioning.transform, "vocab_transform")
            copy(self.captioning.norm, "vocab_layer_norm")


class Contrast(nn.Module):
    """Images and texts as unit vectors of one space, and the scale of their similarities."""

    def __init__(self, width: int, joint_width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, joint_width), nn.Linear(width, joint_width)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / INITIAL_TEMPERATURE)]))

    def forward(self, queries_NQW: Tensor, text_NW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [N, Q, E], texts [N, E], both of length 1 and in fp32, and the scale [1]."""
        return self.of_images(queries_NQW), self.of_texts(text_NW), self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def of_images(self, queries_NQW: Tensor) -> Tensor:
        """Images [N, Q, E], of length 1 and in fp32."""
        return F.normalize(self.image(queries_NQW).float(), dim=-1)

    def of_texts(self, text_NW: Tensor) -> Tensor:
        """Texts [N, E], of length 1 and in fp32."""
        return F.normalize(self.text(text_NW).float(), dim=-1)


class Captioning(nn.Module):
    """DistilBERT's masked-word head, which shares the token embedding, and its own start embedding."""

    def __init__(self, width: int, words: nn.Embedding) -> None:
        super().__init__()
        self.start = LearnedQueries(1, width)
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=NORM_EPSILON)
        self.output = nn.Linear(width, words.num_embeddings)
        self.output.weight = words.weight
        nn.init.zeros_(self.output.bias)

    def forward(self, states_KW: Tensor) -> Tensor:
        """Logits [K, vocabulary], in fp32."""
        logits: Tensor = self.output(self.norm(F.gelu(self.transform(states_KW)))).float()
        return logits
