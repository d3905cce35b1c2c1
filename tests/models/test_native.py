"""Models of native resolution: packed samples compute what the stock class computes of each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batch import collate
from data_pipeline.config import ModelTemplate
from data_pipeline.encode import Encoder
from data_pipeline.record import Record, Turn
from data_pipeline.sample import Encoded
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.common.errors import InputError
from models.opening import open_processor
from models.patch_plan import plan_patches
from models.patches import rope_positions
from models.spec import NativeImage, PatchGrid
from tests.support.flops import ProductCounter
from tests.support.native import MERGE, NATIVE, PATCH, real_tokenizer, stock_content
from tests.support.native_pair import GRIDS, Pair, drawn, png, stock_inputs
from tests.support.paths import needs_data
from tests.support.published import make_published, published
from tests.support.samples import ref
from trainer.config.tuning import TuningPlan
from trainer.flops.counts import count
from trainer.flops.language import needed_flops
from trainer.flops.shapes import model_shape
from trainer.objectives.next_token import pack


@pytest.fixture(scope="module", params=NATIVE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_packed_is_one_by_one(pair: Pair, order: tuple[int, ...]) -> None:
    """Logits, loss and every gradient, tower and mergers included; the order of samples changes nothing."""
    expected, loss, gradients = pair.apart()
    row = tuple(pair.samples[number] for number in order)
    batch = collate([row], pair.facts.text)
    lengths = [each.num_tokens for each in row]
    for number, logits_LV in zip(order, pair.logits(batch).split(lengths), strict=True):
        torch.testing.assert_close(logits_LV, expected[number], rtol=0, atol=2e-5)
    found, ours = pair.together(batch)
    assert float((found - loss).abs() / loss) < 1e-6
    assert set(ours) == set(gradients)
    for name, gradient in ours.items():
        gap = (gradient - gradients[name]).abs().max() / gradients[name].abs().max()
        assert float(gap) < 1e-5, name


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("family", NATIVE[1:])
def test_conversations_in_the_real_vocabulary_are_one_by_one(tmp_path: Path, family: str) -> None:
    """Encoded, packed and run here; rendered, tokenized, cut and run by the stock processor and class."""
    pair = Pair(tmp_path, family, real_tokenizer())
    tokens = Tokens.of(pair.facts.tokenizer, pair.facts.text.image_token)
    encoder = Encoder([], build_template(ModelTemplate(), tokens), tokens, pair.facts.image, 512)
    asked = (("<image>\nIs it <image>\n, héllo 世界?", (0, 1)), ("No picture.", ()), ("<image>\nWhat is it?", (4,)))
    row = []
    for number, (question, places) in enumerate(asked):
        turns = (Turn("user", question), Turn("assistant", "Two circles."))
        record = Record(tuple(png(drawn(place)) for place in places), turns)
        row.append(Encoded(ref(number), *encoder.encode_record(record)))
    found = pair.logits(collate([tuple(row)], pair.facts.text)).split([each.num_tokens for each in row])
    processor = open_processor(tmp_path)
    for (question, places), each, logits_LV in zip(asked, row, found, strict=True):
        content = stock_content(question, [drawn(place) for place in places])
        words: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, **words
        )
        prompt = inputs["input_ids"][0].tolist()
        assert each.input_ids[: len(prompt)].tolist() == prompt
        stock = stock_inputs(each, pair.vlm, pair.facts)
        assert not places or torch.equal(stock["pixel_values"], inputs["pixel_values"])
        pair.stock.model.rope_deltas = None
        with torch.no_grad():
            torch.testing.assert_close(logits_LV, pair.stock(**stock).logits[0], rtol=0, atol=5e-5)


@pytest.mark.slow
def test_recomputed_it_is_the_same_bits(pair: Pair) -> None:
    batch = collate([tuple(pair.samples)], pair.facts.text)
    loss, gradients = pair.together(batch)
    pair.vlm.decoder.recompute(2)
    again, same = pair.together(batch)
    pair.vlm.decoder.recompute(0)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


@pytest.mark.slow
def test_without_images_every_weight_takes_part(pair: Pair) -> None:
    loss, gradients = pair.together(collate([(pair.samples[1],)], pair.facts.text))
    assert torch.isfinite(loss)
    absent = [name for name, gradient in gradients.items() if gradient is None]
    assert not absent
    assert all(
        float(gradient.abs().max()) == 0
        for name, gradient in gradients.items()
        if name.startswith(("vision.", "projector."))
    )
    empty, _ = pair.together(collate([()], pair.facts.text))
    assert float(empty) == 0


def test_neighbours_do_not_move_a_sample(pair: Pair) -> None:
    alone = pair.logits(collate([(pair.samples[2],)], pair.facts.text))
    batch = collate([(pair.samples[0], pair.samples[2])], pair.facts.text)
    torch.testing.assert_close(pair.logits(batch)[-len(alone) :], alone, rtol=0, atol=1e-5)


def test_positions_are_those_of_the_stock_class(pair: Pair) -> None:
    for each in pair.samples:
        inputs = stock_inputs(each, pair.vlm, pair.facts)
        inputs.pop("pixel_values", None)
        expected, _ = pair.stock.model.get_rope_index(**inputs)
        assert pair.facts.text.grid is not None
        is_image = each.input_ids == pair.facts.text.image_token_id
        found = rope_positions(is_image, each.image_sizes, pair.facts.text.grid)
        assert np.array_equal(found, expected[:, 0].numpy())


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[::-1], ((4, 4),), ((6, 6), (2, 14))])
def test_the_plan_is_that_of_transformers(grids: tuple[tuple[int, int], ...]) -> None:
    from transformers import vision_utils

    grid = PatchGrid(patch_size=PATCH, merge=MERGE, window=2, table_side=6)
    plan = plan_patches(grid, [(rows * PATCH, columns * PATCH) for rows, columns in grids])
    thw = torch.tensor([(1, *each) for each in grids])
    windows, starts = vision_utils.get_vision_window_index(thw, MERGE, 2 * PATCH * MERGE, PATCH)
    order = (windows[:, None] * MERGE**2 + torch.arange(MERGE**2)).flatten()
    assert plan.order_P is not None
    assert plan.inverse_P is not None
    assert plan.window_starts_W1 is not None
    assert torch.equal(plan.order_P, order)
    assert torch.equal(plan.window_starts_W1, starts)
    assert torch.equal(plan.order_P[plan.inverse_P], torch.arange(len(order)))
    assert torch.equal(plan.starts_G1, vision_utils.get_vision_cu_seqlens(thw))
    assert torch.equal(plan.places_P2, vision_utils.get_vision_position_ids(thw, MERGE)[order])
    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        thw, 6, align_corners=True, spatial_merge_size=MERGE
    )
    assert plan.taps_P4 is not None
    assert plan.weights_P4 is not None
    assert torch.equal(plan.taps_P4, taps)
    assert torch.equal(plan.weights_P4, weights)


@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (16, 2)])
def test_images_are_resized_as_the_stock_processor_does(patch: int, merge: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    grid = PatchGrid(patch_size=patch, merge=merge)
    fit = NativeImage(grid=grid, min_pixels=4 * grid.factor**2, max_pixels=576 * grid.factor**2)
    generator = np.random.default_rng(0)
    sizes = [(1, 1), (10, 2000), (2000, 10), (4096, 21), (28, 28), (42, 42), (640, 480)]
    sizes += [(int(width), int(height)) for width, height in generator.integers(20, 3000, (500, 2))]
    for width, height in sizes:
        expected = smart_resize(height, width, grid.factor, fit.min_pixels, fit.max_pixels)
        assert fit.fitted(width, height) == expected
    with pytest.raises(InputError, match="too long and thin"):
        fit.fitted(2001, 10)


def test_images_that_do_not_fit_their_tokens_are_an_error(pair: Pair) -> None:
    batch = collate([(pair.samples[0],)], pair.facts.text)
    with pytest.raises(ValueError, match="do not have"):
        pair.vlm.hidden_states(pack(batch), replace(batch.images, tiles_TSSC=batch.images.tiles_TSSC[:-4]))


def test_too_few_layers_for_the_levels_are_refused(tmp_path: Path) -> None:
    import json

    folder = make_published(tmp_path / "qwen3_vl", "qwen3_vl")
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= {"num_hidden_layers": 2, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="2 levels of features"):
        published(folder).projector.build(32, 48)


def test_its_cost_follows_from_patches(pair: Pair) -> None:
    """Matrices by PyTorch's own count; pairs that attend, which are left out of it, by hand."""
    shape = model_shape(pair.source)
    batch = collate([tuple(pair.samples)], pair.facts.text)
    counts = count([batch])
    patches = [rows * columns for rows, columns in GRIDS]
    assert counts.tiles == sum(patches)
    assert counts.image_pairs == sum(number**2 for number in patches)
    # Of windows of 4 x 4 patches: 4 x 6 has 2, 18 x 10 has 5 x 3, 8 x 8 has 4, 2 x 2 has one, 2 x 60 has 15.
    assert counts.window_pairs == {
        "qwen2_5_vl": (16**2 + 8**2) + (8 * 16**2 + 6 * 8**2 + 4**2) + 4 * 16**2 + 4**2 + 15 * 8**2
    }.get(pair.family, counts.image_pairs)
    parts = needed_flops(shape, TuningPlan(), replace(counts, image_pairs=0, window_pairs=0))
    pair.vlm.requires_grad_(False)
    with ProductCounter() as counter:
        pair.vlm._features_of(batch.images)
    assert parts["vision"].forward + parts["projector"].forward == pytest.approx(counter.total, rel=0.01)
    whole = needed_flops(shape, TuningPlan(), counts)["vision"].forward - parts["vision"].forward
    width, num_whole = 32, {"qwen2_5_vl": 2}.get(pair.family, 4)
    assert whole == 4 * width * (counts.image_pairs * num_whole + counts.window_pairs * (4 - num_whole))


@pytest.mark.slow
@pytest.mark.parametrize("family", NATIVE[1:])
def test_compiled_it_computes_the_same(tmp_path: Path, family: str) -> None:
    """DeepStack's features are added between layers that are compiled, whatever the batch's lengths."""
    compiled = Pair(tmp_path, family)
    batches = [collate([row], compiled.facts.text) for row in (tuple(compiled.samples), tuple(compiled.samples[:2]))]
    plain = [compiled.together(batch) for batch in batches]
    compiled.vlm.decoder.compile(backend="aot_eager")
    for batch, (loss, gradients) in zip(batches, plain, strict=True):
        again, same = compiled.together(batch)
        assert float((again - loss).abs() / loss) < 1e-6
        for name, gradient in same.items():
            gap = (gradient - gradients[name]).abs().max() / gradients[name].abs().max()
            assert float(gap) < 1e-5, name
