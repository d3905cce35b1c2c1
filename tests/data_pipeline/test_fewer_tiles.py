"""`too_long: fewer_tiles`: an image gets the largest canvas that fits the row, whole, the same anywhere, counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import collate
from data_pipeline.index_build import build_index
from data_pipeline.sample import Encoded
from data_pipeline.stream import RowStream
from data_pipeline.stream_state import merge_states
from data_pipeline.tiles import canvas_options, fit_tiles, shrink_to_budget
from models.spec import ImageSpec, canvas_size, num_image_tokens
from tests.data_pipeline.test_tiles import noise, png, spec
from tests.support.shards import text_spec, write_tar
from tests.support.streams import TOKENIZER, config, open_rank

NINE = tuple((down, across) for down in (1, 2, 3) for across in (1, 2, 3))


def test_one_image_gets_the_largest_canvas_that_fits() -> None:
    """Canvases of 1, 4 and 9 squares of 24 x 24 patches: each costs its patches, its line ends and
    the small whole one."""
    image_spec, image = spec(squares=NINE), noise(2000, 2000)
    cost = {side: 576 + (24 * side) ** 2 + 24 * side for side in (1, 2, 3)}
    assert [tokens for tokens, _ in canvas_options(image_spec, 2000, 2000)] == [cost[3], cost[2], cost[1]]
    for budget, side in [(cost[3], 3), (cost[3] - 1, 2), (cost[2], 2), (cost[2] - 1, 1), (cost[1], 1), (7, 1)]:
        (fitted,), num_shrunk = shrink_to_budget([image], image_spec, budget)
        assert canvas_size(image_spec, *fitted.size) == (336 * side, 336 * side)
        assert len(fit_tiles(fitted, image_spec)) == 1 + side * side
        assert num_shrunk == (side < 3)
        assert (fitted is image) == (side == 3)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.tuples(st.integers(20, 400), st.integers(20, 400)), min_size=1, max_size=3), data=st.data())
def test_the_budget_holds_and_costs_stay_the_one_function(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    image_spec = spec(28, 7, NINE)
    images = [noise(height, width) for height, width in sizes]
    options = [canvas_options(image_spec, image.width, image.height) for image in images]
    dearest, cheapest = (sum(option[place][0] for option in options) for place in (0, -1))
    budget = data.draw(st.integers(cheapest, dearest + 5))
    fitted, num_shrunk = shrink_to_budget(images, image_spec, budget)
    costs = [num_image_tokens(image_spec, *image.size) for image in fitted]
    assert sum(costs) <= budget
    assert num_shrunk == sum(after is not before for after, before in zip(fitted, images, strict=True))
    if len(images) == 1:
        assert costs == [max(tokens for tokens, _ in options[0] if tokens <= budget)]
    for image, cost, option in zip(fitted, costs, options, strict=True):
        assert (cost, image.size) in option
        height, width = canvas_size(image_spec, *image.size)
        assert len(fit_tiles(image, image_spec)) == 1 + height * width // image_spec.size**2


IMAGE_SPEC = spec(16, 8, NINE)
SIZES = [(50, 60), (16, 16), (48, 48), (10, 90), (200, 200), (33, 17)]
MAX_LENGTH = 80


def open_tiled(
    folder: Path, rank: int, world: int, image_spec: ImageSpec = IMAGE_SPEC, too_long: str = "fewer_tiles"
) -> RowStream:
    data = config(folder, max_length=MAX_LENGTH, too_long=too_long)
    return open_rank(data, rank, world, num_slots=4, image=image_spec, seed=0, quarantine=folder / "quarantine.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fewer")
    samples = [(f"{n}", {"png": png(*size), "txt": b"a" * (8 * n + 1)}) for n, size in enumerate(SIZES)]
    write_tar(folder / "a.tar", [*samples, ("long", {"png": png(60, 60), "txt": b"a" * 70})])
    build_index(folder)
    return folder


def epoch(streams: list[RowStream]) -> dict[str, Encoded]:
    found: dict[str, Encoded] = {}
    while not all(stream.exhausted for stream in streams):
        found |= {sample.key: sample for stream in streams for row in stream.next_rows() for sample in row}
    return found


def test_through_the_stream_nothing_is_cut_and_all_is_counted(folder: Path) -> None:
    alone = open_tiled(folder, 0, 1)
    found = epoch([alone])
    assert set(found) == {f"{n}" for n in range(len(SIZES))}
    image_token = text_spec(TOKENIZER).image_token_id
    num_shrunk = 0
    for key, sample in found.items():
        ((height, width),) = sample.image_sizes
        assert np.count_nonzero(sample.input_ids == image_token) == num_image_tokens(IMAGE_SPEC, width, height)
        assert sample.num_tokens <= MAX_LENGTH
        assert sample.num_shrunk == ((height, width) != SIZES[int(key)])
        num_shrunk += sample.num_shrunk
    assert alone.num_shrunk == num_shrunk == 3
    assert (alone.num_too_long, alone.num_bad) == (1, 0)  # one whose text alone leaves no room for the smallest canvas
    line = json.loads((folder / "quarantine.jsonl").read_text().splitlines()[0])
    assert (line["key"], line["kind"]) == ("long", "too_long")
    batch = collate([(found["4"], found["0"])], text_spec(TOKENIZER))
    assert list(batch.images.sizes) == [found[key].image_sizes[0] for key in ("4", "0")]


def test_ranks_and_resumption_change_nothing(folder: Path) -> None:
    alone = epoch([open_tiled(folder, 0, 1)])
    two = [open_tiled(folder, rank, 2) for rank in range(2)]
    first = {sample.key: sample for stream in two for row in stream.next_rows() for sample in row}
    state = json.loads(json.dumps(merge_states(stream.state_dict() for stream in two)))
    four = [open_tiled(folder, rank, 4) for rank in range(4)]
    for stream in four:
        stream.load_state_dict(state)
    found = first | epoch(four)
    assert set(found) == set(alone)
    assert all(np.array_equal(found[key].tiles, alone[key].tiles) for key in alone)
    assert sum(stream.num_shrunk for stream in four) == 3  # the count goes on where it stood
