"""A model of native resolution and the stock class over the same files, and samples of odd sizes for both."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.sample import Encoded, SampleRef
from data_pipeline.tiles import cut_patches
from models.build import ModelMetadata, build_vlm, read_metadata
from models.opening import open_model
from models.published.names import place_of
from models.spec import IGNORE_INDEX
from models.vlm import VLM
from tests.support.native import MERGE, PATCH
from tests.support.published import make_published, published
from trainer.objectives.next_token import NextTokenLoss, pack

GRIDS = ((4, 6), (18, 10), (8, 8), (2, 2), (2, 60))
"""(rows, columns) of patches; a window has 4 x 4, so that most are no multiple, and one is far from square."""

SAMPLES: tuple[tuple[int, ...], ...] = ((0, 1), (), (2,), (3, 4))
"""The images of each sample."""


@cache
def drawn(place: int) -> Image.Image:
    rows, columns = GRIDS[place]
    generator = np.random.default_rng(place)
    return Image.fromarray(generator.integers(0, 256, (rows * PATCH, columns * PATCH, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def sample(number: int, facts: ModelMetadata) -> Encoded:
    """Text, then each image and more text behind it; every text token but the first is a target."""
    generator = np.random.default_rng(100 + number)
    grid = facts.text.grid
    assert grid is not None
    ids: list[int] = generator.integers(7, 300, 5).tolist()
    tiles, sizes = [np.zeros((0, PATCH, PATCH, 3), dtype=np.uint8)], []
    for place in SAMPLES[number]:
        rows, columns = GRIDS[place]
        size = (rows * PATCH, columns * PATCH)
        tiles.append(cut_patches(drawn(place), size, grid))
        sizes.append(size)
        ids += [facts.text.image_token_id] * (rows * columns // MERGE**2)
        ids += generator.integers(7, 300, 4 + place).tolist()
    ids_L = np.asarray(ids, dtype=np.int32)
    labels_L = np.where(ids_L == facts.text.image_token_id, IGNORE_INDEX, ids_L)
    ref = SampleRef(number, 0, 0, number, "a.tar", str(number))
    return Encoded(ref, ids_L, labels_L, np.concatenate(tiles), tuple(sizes))


def stock_inputs(encoded: Encoded, vlm: VLM, facts: ModelMetadata) -> dict[str, Tensor]:
    ids_1L = torch.tensor(encoded.input_ids, dtype=torch.int64)[None]
    inputs = {"input_ids": ids_1L, "mm_token_type_ids": (ids_1L == facts.text.image_token_id).int()}
    if len(encoded.tiles):
        pixels_PCSS = vlm.normalise(torch.from_numpy(encoded.tiles))
        inputs["pixel_values"] = pixels_PCSS.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1)
        grids = [(1, height // PATCH, width // PATCH) for height, width in encoded.image_sizes]
        inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


class Pair:
    """Ours and the stock model over the same files."""

    def __init__(self, folder: Path, family: str, tokenizer: Any = None) -> None:
        self.family = family
        make_published(folder, family, tied=family == "qwen2_vl", tokenizer=tokenizer)
        self.source = published(folder)
        self.facts = read_metadata(self.source, 512)
        self.vlm = build_vlm(self.source, self.facts, frozen_dtype=torch.float32, seed=0)
        self.stock: Any = open_model(folder, torch.device("cpu"))
        self.samples = [sample(number, self.facts) for number in range(len(SAMPLES))]

    def apart(self) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Logits of each sample [L, V], the sum of all losses, and gradients by our names, of the stock class."""
        self.stock.zero_grad()
        logits, losses = [], []
        for each in self.samples:
            self.stock.model.rope_deltas = None
            logits.append(self.stock(**stock_inputs(each, self.vlm, self.facts)).logits[0])
            targets = torch.tensor(each.labels[1:], dtype=torch.int64)
            losses.append(torch.nn.functional.cross_entropy(logits[-1][:-1], targets, reduction="sum"))
        total = torch.stack(losses).sum()
        total.backward()
        gradients: dict[str, Any] = {our_name(name): each.grad for name, each in self.stock.named_parameters()}
        return [each.detach() for each in logits], total.detach(), gradients

    def together(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.vlm.requires_grad_(True).zero_grad()
        loss = NextTokenLoss()(self.vlm, batch).loss_sum
        loss.backward()
        gradients: dict[str, Any] = {name: each.grad for name, each in self.vlm.named_parameters()}
        return loss.detach(), gradients

    def logits(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            hidden_ND = self.vlm.hidden_states(replace(pack(batch), wanted_K=None), batch.images)
            return self.vlm.head(hidden_ND)


def our_name(raw: str) -> str:
    place = place_of(raw)
    assert place is not None, raw
    return f"{place.part}.model.{place.name}" if place.part == "vision" else f"{place.part}.{place.name}"
