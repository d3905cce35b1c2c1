"""No sample sees another: through stream, rows and model, each sample's loss is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.batch import Batch, collate
from data_pipeline.build import open_stream
from data_pipeline.index_build import build_index
from data_pipeline.sample import Encoded, Row
from models.build import ModelMetadata, build_vlm, read_metadata
from models.spec import IGNORE_INDEX
from models.vlm import VLM
from tests.support.backbones import tiny_recipe
from tests.support.shards import caption_sample, chat_sample, image_bytes, write_tar
from trainer.config.recipe import Recipe
from trainer.objectives.chunked_loss import head_losses
from trainer.objectives.next_token import pack

PACKINGS = {
    "pad": {"kind": "pad"},
    "pack": {"kind": "pack", "row_tokens": 300, "lookahead": 4},
    "group": {"kind": "group", "lookahead": 3},
}
NUM_SAMPLES = 17


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, ModelMetadata, VLM]:
    """A tiny real model, and captions, conversations, two images in one sample, and text alone."""
    folder = tmp_path_factory.mktemp("packing")
    two = {"0.png": image_bytes(1), "1.png": image_bytes(2), "txt": b"two images of noise"}
    samples = [(f"caption{n}", caption_sample(n, words=3 * n)) for n in range(7)]
    samples += [(f"chat{n}", chat_sample(n, turns=1 + n % 3)) for n in range(6)]
    samples += [(f"text{n}", caption_sample(n, image=False)) for n in range(3)]
    (folder / "set").mkdir()
    write_tar(folder / "set" / "a.tar", [*samples, ("two", two)])
    build_index(folder / "set")
    recipe = Recipe.model_validate(tiny_recipe(folder, folder / "set"))
    facts = read_metadata(recipe.model, 300)
    return recipe, facts, build_vlm(recipe.model, facts, frozen_dtype=torch.float32, seed=0).eval()


def batches(recipe: Recipe, facts: ModelMetadata, packing: dict[str, Any]) -> list[list[Row]]:
    """The rows of one epoch, step by step."""
    data = recipe.stage("align").data
    data = type(data).model_validate(data.model_dump() | {"packing": packing})
    stream = open_stream(
        data,
        tokenizer=facts.tokenizer,
        image=facts.image,
        text=facts.text,
        seed=0,
        num_slots=3,
        slots=range(3),
        epochs=1,
        quarantine=None,
    )
    found = []
    while not stream.exhausted:
        found.append(stream.next_rows())
    return found


def losses_in(vlm: VLM, batch: Batch) -> dict[str, float]:
    """Each sample's loss out of a batch, by the training path."""
    hidden_KD = vlm.hidden_states(pack(batch), batch.images)
    places_K = batch.layout.real_N[batch.layout.supervised_K]
    losses_K, _ = head_losses(
        vlm.language.get_output_embeddings(), hidden_KD, batch.tokens.targets_BL.flatten()[places_K]
    )
    rows = (places_K // batch.tokens.input_ids_BL.shape[1]).tolist()
    segments = batch.tokens.segment_ids_BL.flatten()[places_K].tolist()
    found: dict[str, float] = {}
    for row, segment, loss in zip(rows, segments, losses_K.tolist(), strict=True):
        key = batch.keys[row][segment - 1]
        found[key] = found.get(key, 0.0) + loss
    return found


def loss_alone(vlm: VLM, sample: Encoded) -> float:
    """A sample's loss by transformers' own forward of the language model: no rows, no segments, a plain causal mask."""
    ids = torch.from_numpy(sample.input_ids).long()[None]
    inputs = vlm.decoder_inputs(ids, vlm.normalise(torch.from_numpy(sample.tiles)))
    logits = vlm.language(**inputs).logits[0, :-1]
    targets = torch.from_numpy(sample.labels[1:]).long()
    return float(F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum"))


@pytest.mark.parametrize("name", PACKINGS)
@torch.no_grad()
def test_each_loss_is_what_it_is_alone(world: tuple[Recipe, ModelMetadata, VLM], name: str) -> None:
    recipe, facts, vlm = world
    found: dict[str, float] = {}
    alone: dict[str, float] = {}
    most_in_a_row = 0
    for rows in batches(recipe, facts, PACKINGS[name]):
        found |= losses_in(vlm, collate(rows, facts.text))
        alone |= {sample.key: loss_alone(vlm, sample) for row in rows for sample in row}
        most_in_a_row = max(most_in_a_row, *map(len, rows))
    assert len(found) == NUM_SAMPLES
    assert (most_in_a_row > 2) == (name == "pack")
    assert len({round(loss, 3) for loss in alone.values()}) == NUM_SAMPLES  # a mixed-up sample would be seen
    assert found == pytest.approx(alone, rel=2e-5)  # fp32 sums over another order of rows
