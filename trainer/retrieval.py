"""Retrieval: which text a picture finds among all, which picture a text finds, and a picture of the similarities.

Owns the figures and the grid. Does not own the similarity (`trainer.image_text`) or which samples they are.

N held-out pairs, Q queries, E the width in which they are compared.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trainer.image_text import similarity
from trainer.loss_sum import Embeddings

RANKS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = tuple(f"{direction}/recall_at_{rank}" for direction in DIRECTIONS for rank in RANKS)
PICTURES_AT_ONCE = 256
_CELL, _TEXT_WIDTH = 112, 280


def measure(found: Embeddings) -> tuple[dict[str, float], Tensor]:
    """Recall at 1, 5 and 10 both ways and the contrastive loss over all N pairs at once; the similarities [N, N].

    A share: the right partner is among the nearest 1, 5 or 10 of all N. A text that fits several pictures counts as
    wrong for all but its own. Similarities are cosines, pictures down, texts across.
    """
    chunks = found.pictures_NQE.split(PICTURES_AT_ONCE)
    scores_NN = torch.cat([similarity(chunk, found.texts_NE) for chunk in chunks])
    metrics = dict(zip(METRICS, [*_recalls(scores_NN), *_recalls(scores_NN.T)], strict=True))
    logits_NN, own_N = found.scale.float() * scores_NN, torch.arange(len(scores_NN))
    loss = (F.cross_entropy(logits_NN, own_N) + F.cross_entropy(logits_NN.T, own_N)) / 2
    return {"loss": float(loss), **metrics}, scores_NN


def _recalls(scores_NN: Tensor) -> list[float]:
    """A tie with the right partner counts against it, so that equal features find nothing."""
    own_N = scores_NN.diagonal().unsqueeze(1)
    num_nearer_N = (scores_NN >= own_N).sum(1) - 1
    return [float((num_nearer_N < rank).float().mean()) for rank in RANKS]


def draw_grid(pictures: Sequence[Image.Image], texts: Sequence[str], scores_NN: Tensor) -> Image.Image:
    """Texts down, pictures across, each cell their cosine; the nearest picture of each text is framed."""
    font, count = ImageFont.load_default(12), len(pictures)
    grid = Image.new("RGB", (_TEXT_WIDTH + _CELL * count, _CELL * (count + 1)), "white")
    pencil = ImageDraw.Draw(grid)
    low, high = float(scores_NN.min()), float(scores_NN.max())
    for column, picture in enumerate(pictures):
        small = picture.convert("RGB")
        small = small.resize((_CELL - 8, _CELL - 8))
        grid.paste(small, (_TEXT_WIDTH + column * _CELL + 4, 4))
    for row, text in enumerate(texts):
        top = (row + 1) * _CELL
        pencil.text((4, top + 8), "\n".join(textwrap.wrap(text, 44)[:6]), fill="black", font=font)
        nearest = int(scores_NN[:, row].argmax())
        for column in range(count):
            score = float(scores_NN[column, row])
            shade = int(235 * (1 - (score - low) / max(high - low, 1e-6)))
            left = _TEXT_WIDTH + column * _CELL
            box = [(left + 2, top + 2), (left + _CELL - 3, top + _CELL - 3)]
            outline = "red" if column == nearest else None
            pencil.rectangle(box, fill=(shade, shade, 255), outline=outline, width=3)
            ink = "white" if shade < 120 else "black"
            pencil.text((left + 36, top + 48), f"{score:.2f}", fill=ink, font=font)
    return grid
