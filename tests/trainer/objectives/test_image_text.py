"""BLIP-2's losses: equal to a plain reference, the same on any number of ranks, and a bad pair spoils no other."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch, collate
from data_pipeline.config import PairTemplate
from data_pipeline.index_build import build_index
from data_pipeline.record import Turn
from data_pipeline.sample import Encoded
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.build import ModelMetadata, build_vlm, read_metadata
from models.common.errors import InputError
from models.projectors.qformer import QFormer
from models.vlm import VLM
from tests.support.qformer import NUM_QUERIES, qformer_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import caption_sample, write_tar
from tests.support.training import losses, same_weights, train_all, vary
from trainer.config.recipe import Recipe
from trainer.objectives.gather import check_rows_at_once
from trainer.objectives.image_text import ImageText, ImageTextLoss
from trainer.objectives.loss_sum import Embeddings, LossSum
from trainer.validation.held_out import HeldOut
from trainer.validation.retrieval import draw_grid, measure

ALL = ("itc", "itm", "itg")
SMOOTHING = 0.1


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("image_text")
    (folder / "shards").mkdir()
    samples = [(f"{number:06d}", caption_sample(number, words=1 + number % 4)) for number in range(12)]
    write_tar(folder / "shards" / "shard-000000.tar", samples)
    build_index(folder / "shards")
    return qformer_recipe(folder, folder / "shards")


@pytest.fixture(scope="module")
def parts(recipe: dict[str, Any]) -> tuple[VLM, ModelMetadata, list[Encoded]]:
    parsed = Recipe.model_validate(recipe)
    data = parsed.stage("contrast").data
    facts = read_metadata(parsed.model, data.max_length, "projector")
    vlm = build_vlm(parsed.model, facts, frozen_dtype=torch.float32, seed=3)
    for parameter in vlm.projector.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    found = HeldOut.open(data, facts, 6).encoded(range(6))
    samples = [sample for sample in found if isinstance(sample, Encoded)]
    assert len(samples) == 6
    return vlm, facts, samples


def run(vlm: VLM, batch: Batch, kinds: tuple[str, ...]) -> LossSum:
    vlm.zero_grad()
    vlm.requires_grad_(False)
    vlm.projector.requires_grad_(True)
    config = ImageText.model_validate({"losses": list(kinds), "label_smoothing": SMOOTHING})
    sums = ImageTextLoss(config)(vlm, batch)
    sums.loss_sum.backward()
    return sums


def smoothed(logits: Tensor, target: int) -> Tensor:
    """Cross-entropy by its definition: 1 - e on the target and e spread over all."""
    logs = logits - torch.logsumexp(logits, 0)
    return -(1 - SMOOTHING) * logs[target] - SMOOTHING * logs.mean()


def pair_similarity(qformer: QFormer, features: Tensor, ids: Tensor) -> Tensor:
    """One image [P, V] and one text [L]: the scaled cosine of the nearest query."""
    assert qformer.text is not None
    head = qformer.text.contrast
    image = head.image(qformer.see(features[None])[0])
    text = head.text(qformer.read(ids[None], torch.ones_like(ids[None], dtype=torch.bool))[0, 0])
    cosines = [torch.dot(query, text) / (query.norm() * text.norm()) for query in image]
    return torch.stack(cosines).max() * head.log_scale.exp()[0]


def drawn(scores: list[float], own: int, lot: float) -> int:
    """The wrong partner that a number in [0, 1) draws, the more similar the likelier."""
    shares = [0.0 if place == own else math.exp(score) for place, score in enumerate(scores)]
    left = lot * sum(shares)
    for place, share in enumerate(shares):
        left -= share
        if left < 0:
            return place
    raise AssertionError("a lot in [0, 1) draws one")


def reference(vlm: VLM, samples: list[Encoded], kind: str) -> Tensor:
    """One loss over single pairs, with nothing batched, padded or gathered: the mean over pairs, of ITG over words."""
    qformer = vlm.projector
    tiles = [torch.from_numpy(sample.tiles) for sample in samples]
    features = [vlm.vision(vlm.normalise(tile))[0] for tile in tiles]
    texts = [torch.from_numpy(sample.input_ids[NUM_QUERIES:]).long() for sample in samples]
    if kind == "itg":
        return torch.stack(list(word_losses(qformer, features, texts))).mean()
    scores = torch.stack([torch.stack([pair_similarity(qformer, each, text) for text in texts]) for each in features])
    places = range(len(samples))
    if kind == "itc":
        both = [(smoothed(scores[place], place) + smoothed(scores[:, place], place)) / 2 for place in places]
        return torch.stack(both).mean()
    found = []
    for place, sample in enumerate(samples):
        lots = {
            salt: zlib.crc32(f"{salt}/{sample.shard}/{sample.key}".encode()) / 2**32 for salt in ("text", "picture")
        }
        wrong_text = drawn(scores[place].tolist(), place, lots["text"])
        wrong_image = drawn(scores[:, place].tolist(), place, lots["picture"])
        for image, text, fits in ((place, place, 1), (wrong_image, place, 0), (place, wrong_text, 0)):
            ids = texts[text][None]
            queries = qformer.match(features[image][None], ids, torch.ones_like(ids, dtype=torch.bool))[0]
            logits = torch.stack([qformer.text.matching(query) for query in queries]).mean(0)
            found.append(torch.logsumexp(logits, 0) - logits[fits])
    return torch.stack(found).mean()


def word_losses(qformer: QFormer, features: list[Tensor], texts: list[Tensor]) -> Any:
    for image, ids in zip(features, texts, strict=True):
        for length in range(1, len(ids)):
            begun = ids[None, :length]
            states = qformer.caption(image[None], begun, torch.ones_like(begun, dtype=torch.bool))
            yield smoothed(qformer.text.captioning(states[0, -1]), int(ids[length]))  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ALL)
def test_each_loss_and_its_gradient_equal_a_plain_reference(
    parts: tuple[VLM, ModelMetadata, list[Encoded]], kind: str
) -> None:
    """Texts of unequal length, a row that ran out and a row of two pairs among them. fp32, hence the tolerance."""
    vlm, facts, samples = parts
    batch = collate([(samples[0],), (), (samples[1], samples[2]), (samples[3],), (samples[4],)], facts.text)
    assert batch.num_targets == batch.num_samples == 5
    assert len({sample.num_tokens for sample in samples[:5]}) > 1
    sums = run(vlm, batch, (kind,))
    found = {name: value.grad.clone() for name, value in vlm.projector.named_parameters() if value.grad is not None}
    assert float(sums.row_loss_sums_B.sum()) == pytest.approx(float(sums.loss_sum.detach()), rel=1e-6)
    assert sums.row_loss_sums_B.tolist()[1] == 0.0

    vlm.zero_grad()
    expected = reference(vlm, samples[:5], kind)
    expected.backward()
    assert float(sums.loss_sum.detach()) / batch.num_targets == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, value in vlm.projector.named_parameters():
        if value.grad is not None and value.grad.any():
            torch.testing.assert_close(found[name] / 5, value.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_three_are_added_up(parts: tuple[VLM, ModelMetadata, list[Encoded]]) -> None:
    vlm, facts, samples = parts
    batch = collate([(sample,) for sample in samples], facts.text)
    alone = [float(run(vlm, batch, (kind,)).loss_sum.detach()) for kind in ALL]
    assert float(run(vlm, batch, ALL).loss_sum.detach()) == pytest.approx(sum(alone), rel=1e-6)


def test_one_pair_has_nothing_wrong_beside_it_and_none_gives_gradients_of_zero(
    parts: tuple[VLM, ModelMetadata, list[Encoded]],
) -> None:
    vlm, facts, samples = parts
    assert float(run(vlm, collate([(samples[0],)], facts.text), ("itc",)).loss_sum.detach()) == pytest.approx(0.0)
    assert math.isfinite(run(vlm, collate([(samples[0],)], facts.text), ("itm",)).loss_sum.item())
    nothing = run(vlm, collate([(), ()], facts.text), ALL)
    assert (float(nothing.loss_sum.detach()), nothing.row_loss_sums_B.tolist()) == (0.0, [0.0, 0.0])
    learning = [value for name, value in vlm.projector.named_parameters() if not name.startswith("adapter.")]
    assert all(value.grad is not None and not value.grad.any() for value in learning)


def test_a_pair_that_is_not_finite_is_named_and_spoils_no_other(
    parts: tuple[VLM, ModelMetadata, list[Encoded]],
) -> None:
    vlm, facts, samples = parts
    batch = collate([(sample,) for sample in samples[:4]], facts.text)
    poison = vlm.vision.register_forward_hook(
        lambda _module, _inputs, output: output.index_fill(0, torch.tensor([2]), torch.nan)
    )
    rows = run(vlm, batch, ALL).row_loss_sums_B
    poison.remove()
    assert torch.isfinite(rows).tolist() == [True, True, False, True]


def test_a_pair_has_one_image_and_one_target(parts: tuple[VLM, ModelMetadata, list[Encoded]]) -> None:
    _, facts, samples = parts
    ids = samples[0].input_ids.tolist()
    assert ids[:NUM_QUERIES] == [facts.text.image_token_id] * NUM_QUERIES
    words = facts.tokenizer.convert_ids_to_tokens(ids[NUM_QUERIES:])
    assert (words[0], words[-1], words.count("[SEP]")) == ("[CLS]", "[SEP]", 1)
    tokens = Tokens.of(facts.tokenizer)
    template = build_template(PairTemplate(), tokens)
    with pytest.raises(InputError, match="0 images, and a pair has one"):
        template.segments([Turn("user", "a"), Turn("assistant", "b")])


def test_accumulation_is_refused_before_anything_runs(recipe: dict[str, Any]) -> None:
    parsed = Recipe.model_validate(vary(recipe, "x", "contrast", batch__global_rows=9))
    with pytest.raises(InputError, match=r"micro_rows: 4, but image_text .* take its 9 at once: raise it to 9"):
        check_rows_at_once(parsed.stage("contrast"), 1, "stages.contrast")
    with pytest.raises(InputError, match="take its 5 at once"):
        check_rows_at_once(parsed.stage("contrast"), 2, "stages.contrast")
    check_rows_at_once(parsed.stage("contrast"), 3, "stages.contrast")
    check_rows_at_once(parsed.stage("align"), 1, "stages.align")


def test_recall_counts_what_is_nearer_and_a_tie_against_it() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(40, 3, 8, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    metrics, scores = measure(Embeddings(images, texts, torch.tensor([10.0])), range(40), range(40))
    plain = [[max(float(query @ text) for query in image) for text in texts] for image in images]
    torch.testing.assert_close(scores, torch.tensor(plain))
    for rank in (1, 5, 10):
        to_text = sum(sorted(row, reverse=True).index(row[i]) < rank for i, row in enumerate(plain)) / 40
        columns = [[row[i] for row in plain] for i in range(40)]
        to_image = sum(sorted(column, reverse=True).index(column[i]) < rank for i, column in enumerate(columns)) / 40
        assert metrics[f"image_to_text/recall_at_{rank}"] == pytest.approx(to_text)
        assert metrics[f"text_to_image/recall_at_{rank}"] == pytest.approx(to_image)
    equal = Embeddings(images[:1].expand(40, 3, 8), texts[:1].expand(40, 8), torch.tensor([10.0]))
    same, _ = measure(equal, range(40), range(40))
    assert same["image_to_text/recall_at_10"] == 0.0
    assert same["loss"] == pytest.approx(math.log(40))


def _clip_benchmark_recall(scores: torch.Tensor, pairs: torch.Tensor, rank: int) -> float:
    """CLIP_benchmark's rule as its page states it: is any right candidate among the `rank` nearest?"""
    nearest = scores.topk(rank, dim=1).indices
    return float(pairs.gather(1, nearest).any(1).float().mean())


def test_any_caption_of_an_image_is_its_text_and_an_image_with_five_captions_is_one_image() -> None:
    generator = torch.Generator().manual_seed(0)
    places = [place for place in range(12) for _ in range(5)]
    images = torch.nn.functional.normalize(torch.randn(12, 1, 16, generator=generator), dim=-1)[places]
    noise = torch.randn(60, 16, generator=generator)
    for spread in (0.01, 0.6):
        texts = torch.nn.functional.normalize(images[:, 0] + spread * noise, dim=-1)
        metrics, scores = measure(Embeddings(images, texts, torch.tensor([10.0])), places, range(60))
        pairs = torch.tensor([[place == other for other in places] for place in range(12)])
        for rank in (1, 5, 10):
            to_text = _clip_benchmark_recall(scores[::5], pairs, rank)
            to_image = _clip_benchmark_recall(scores[::5].T, pairs.T, rank)
            assert metrics[f"image_to_text/recall_at_{rank}"] == pytest.approx(to_text)
            assert metrics[f"text_to_image/recall_at_{rank}"] == pytest.approx(to_image)
        if spread == 0.01:
            assert metrics["image_to_text/recall_at_1"] == metrics["text_to_image/recall_at_1"] == 1.0


def test_a_caption_of_two_images_is_right_for_both() -> None:
    images, texts = torch.eye(3)[:, None], torch.eye(3)[[0, 0, 2]]
    metrics, _ = measure(Embeddings(images, texts, torch.tensor([10.0])), "abc", ["one", "one", "two"])
    assert metrics["text_to_image/recall_at_1"] == 1.0
    assert metrics["image_to_text/recall_at_1"] == pytest.approx(2 / 3)  # b's own text is as near as the other one


def _validated(recipe: dict[str, Any], run: str, **changes: Any) -> dict[str, Any]:
    data = recipe["stages"]["contrast"]["data"]
    validation = {"data": data, "every_steps": 2, "num_samples": 11, "metric": "validation/image_to_text/recall_at_1"}
    return vary(
        recipe, run, "contrast", validation=validation, tune__vision={"kind": "full", "learning_rate": 1e-4}, **changes
    )


@pytest.mark.slow
def test_two_ranks_are_one_rank_and_a_killed_run_goes_on(recipe: dict[str, Any]) -> None:
    """All three losses with a vision encoder that learns too, whose gradients cross the ranks; 3 rows a batch, so that
    the ranks have unequal shares. The second is killed on two ranks and goes on with one."""
    rows: dict[str, Any] = {"batch__global_rows": 3, "duration": {"unit": "epochs", "count": 1}}
    one, two, killed = (
        _validated(recipe, name, engine__zero=zero, **rows)
        for name, zero in (("one", "zero0"), ("two", "zero3"), ("killed", "zero2"))
    )
    run_on_ranks(2, train_all, [(two, "contrast", {}), (killed, "contrast", {"stop_after": 3})])
    run_on_ranks(1, train_all, [(one, "contrast", {}), (killed, "contrast", {})])
    for other in (two, killed):
        assert losses(other, "contrast") == pytest.approx(losses(one, "contrast"), rel=1e-4)
        same_weights(other, one, "contrast", rtol=1e-2, atol=1e-3)  # Adam's first steps enlarge rounding
        found, expected = validations(other), validations(one)
        assert [set(line) for line in found] == [set(line) for line in expected]
        for line, right in zip(found, expected, strict=True):
            assert line["validation/loss"] == pytest.approx(right["validation/loss"], rel=1e-3)
            assert line["validation/samples"] == right["validation/samples"] == 11
    directory = Path(one["run"]) / "contrast" / "validation"
    assert (directory / "step_000004.png").is_file()
    assert "data:image/jpeg" in (directory / "step_000004.html").read_text()


def validations(recipe: dict[str, Any]) -> list[dict[str, float]]:
    from models.common.files import read_lines

    return read_lines(Path(recipe["run"]) / "contrast" / "validation.jsonl")


def test_the_grid_frames_the_nearest_image() -> None:
    from PIL import Image

    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3]])
    grid = draw_grid([Image.new("RGB", (20, 30), colour) for colour in ("red", "green")], ["one", "two"], scores)
    assert grid.size == (280 + 2 * 112, 3 * 112)
    frames = [grid.getpixel((280 + column * 112 + 3, (row + 1) * 112 + 3)) for row in range(2) for column in range(2)]
    assert frames[0] == frames[3] == (255, 0, 0)
    assert (255, 0, 0) not in (frames[1], frames[2])
