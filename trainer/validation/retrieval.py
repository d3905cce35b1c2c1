"""Retrieval: the nearest text of each image, the nearest image of each text, and an image of the similarities.

Owns the figures and the grid. Does not own recall (`eval.recall`), the similarity (`trainer.objectives.image_text`) or
the choice of samples.

N held-out pairs, Q queries, E the width in which they are compared; I different images, T different texts.
"""

from __future__ import annotations

import textwrap
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eval.recall import recalls
from trainer.objectives.image_text import similarity
from trainer.objectives.loss_sum import Embeddings

IMAGES_AT_ONCE = 256
_CELL, _TEXT_WIDTH = 112, 280


def measure(
    found: Embeddings, images: Sequence[Hashable], texts: Sequence[Hashable]
) -> tuple[dict[str, float], Tensor]:
    """Recall at 1, 5 and 10 both ways and the contrastive loss over all N pairs at once; the similarities [N, N].

    Images with several captions, as COCO's have five, are compared once: an image has found its text where any of its
    captions is among the nearest 1, 5 or 10, and a text has found its image where the image it was written for is. This
    is CLIP_benchmark's recall (https://github.com/LAION-AI/CLIP_benchmark, `zeroshot_retrieval.py`), except that equal
    texts are one text too, which may belong to several images. A text that merely fits other images counts as wrong for
    them. Recall is a share of the different images or texts. The loss knows pairs only.

    Args:
        images: what tells the N images apart: equal values are the same image.
        texts: the same of the N texts.

    Returns:
        The metrics by name, and cosines, images down, texts across.
    """
    chunks = found.images_NQE.split(IMAGES_AT_ONCE)
    scores_NN = torch.cat([similarity(chunk, found.texts_NE) for chunk in chunks])
    image_N, first_images = _numbered(images)
    text_N, first_texts = _numbered(texts)
    is_pair_IT = torch.zeros(len(first_images), len(first_texts), dtype=torch.bool)
    is_pair_IT[image_N, text_N] = True
    scores_IT = scores_NN[first_images][:, first_texts]
    metrics = recalls(scores_IT, is_pair_IT)
    logits_NN, own_N = found.scale.float() * scores_NN, torch.arange(len(scores_NN))
    loss = (F.cross_entropy(logits_NN, own_N) + F.cross_entropy(logits_NN.T, own_N)) / 2
    return {"loss": float(loss), **metrics}, scores_NN


def _numbered(values: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """The number of each value among the different ones, and where each different one stands first."""
    firsts: dict[Hashable, int] = {}
    for place, value in enumerate(values):
        firsts.setdefault(value, place)
    numbers = {value: number for number, value in enumerate(firsts)}
    return [numbers[value] for value in values], list(firsts.values())


def draw_grid(images: Sequence[Image.Image], texts: Sequence[str], scores_NN: Tensor) -> Image.Image:
    """Texts down, images across, each cell their cosine; the nearest image of each text is framed."""
    font, count = ImageFont.load_default(12), len(images)
    grid = Image.new("RGB", (_TEXT_WIDTH + _CELL * count, _CELL * (count + 1)), "white")
    pencil = ImageDraw.Draw(grid)
    low, high = float(scores_NN.min()), float(scores_NN.max())
    for column, image in enumerate(images):
        small = image.convert("RGB")
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
