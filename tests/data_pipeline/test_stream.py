"""The global batch is the same on any number of ranks and workers, and nothing is lost or seen twice by stopping."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, GroupPacking, PadPacking, RowPacking, SourceConfig
from data_pipeline.fetch import Fetcher, Result
from data_pipeline.index_build import build_index
from data_pipeline.sample import Row, SampleRef
from data_pipeline.sample_order import SampleOrder
from data_pipeline.stream import RowStream
from data_pipeline.stream_state import merge_states
from models.common.errors import AwayError, InputError
from tests.support.paths import REPOSITORY
from tests.support.shards import caption_sample, image_bytes, write_set, write_tar
from tests.support.streams import config, keys_left, open_rank

SIZES = [7, 1, 13]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "set"
    write_set(path, SIZES)
    return path


def keys(rows: list[Row]) -> list[tuple[str, ...]]:
    return [tuple(sample.key for sample in row) for row in rows]


def global_batches(streams: list[RowStream]) -> Iterator[list[tuple[str, ...]]]:
    """The global batches of all ranks together, until every rank has run out."""
    while not all(stream.exhausted for stream in streams):
        yield [row for stream in streams for row in keys(stream.next_rows())]


def all_batches(data: DataConfig, world: int, **values: Any) -> list[list[tuple[str, ...]]]:
    streams = [open_rank(data, rank, world, **values) for rank in range(world)]
    found = list(global_batches(streams))
    for stream in streams:
        stream.close()
    return found


PACKINGS = [PadPacking(), RowPacking(row_tokens=400, lookahead=3), GroupPacking(lookahead=2)]
PACKING_NAMES = ["pad", "pack", "group"]


@pytest.mark.parametrize("packing", PACKINGS, ids=PACKING_NAMES)
def test_the_global_batch_is_the_same_on_1_2_4_and_8_ranks(folder: Path, packing: Any) -> None:
    data = config(folder, packing=packing)
    alone = all_batches(data, 1)
    assert Counter(key for batch in alone for row in batch for key in row) == {f"{n:06d}": 1 for n in range(21)}
    for world in (2, 4, 8):
        assert all_batches(data, world) == alone


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "num_workers"), [*((packing, 3) for packing in PACKINGS), (PACKINGS[1], 1)])
def test_workers_change_nothing(folder: Path, packing: Any, num_workers: int) -> None:
    alone = all_batches(config(folder, packing=packing), 1)
    assert all_batches(config(folder, packing=packing, num_workers=num_workers), 1) == alone


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    stops=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=6),
    packing=st.sampled_from(PACKINGS),
    epochs=st.integers(1, 2),
)
def test_stopped_anywhere_and_resumed_on_any_number_of_ranks(
    folder: Path, stops: list[tuple[int, int]], packing: Any, epochs: int
) -> None:
    data = config(folder, packing=packing)
    expected = all_batches(data, 1, epochs=epochs)
    found: list[list[tuple[str, ...]]] = []
    state: dict[str, Any] | None = None
    for num_steps, world in [*stops, (10**6, 2)]:
        streams = [open_rank(data, rank, world, epochs=epochs) for rank in range(world)]
        if state is not None:
            for stream in streams:
                stream.load_state_dict(state)
        batches = global_batches(streams)
        found += [batch for _, batch in zip(range(num_steps), batches, strict=False)]
        state = json.loads(json.dumps(merge_states(stream.state_dict() for stream in streams)))
    assert found == expected
    assert set(Counter(key for batch in found for row in batch for key in row).values()) == {epochs}


@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), num_slots=st.sampled_from([2, 4, 16]))
def test_fewer_samples_than_slots(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], num_slots: int) -> None:
    path = tmp_path_factory.mktemp("small")
    write_set(path, sizes, image=False)
    batches = all_batches(config(path), 2, num_slots=num_slots)
    assert sorted(key for batch in batches for row in batch for key in row) == [f"{n:06d}" for n in range(sum(sizes))]
    assert all(len(batch) == num_slots for batch in batches)


def test_two_sources_without_weights_are_one_epoch(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", [5], image=False)
    batches = all_batches(config(folder, tmp_path / "other"), 2)
    counts = Counter(key for batch in batches for row in batch for key in row)
    assert sum(counts.values()) == 26


@pytest.mark.slow
def test_weighted_sources_are_as_elastic_and_have_epochs(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", [9])
    sources = (SourceConfig(path=str(folder), weight=3), SourceConfig(path=str(tmp_path / "other"), weight=1))
    data = config(folder, packing=PACKINGS[1]).model_copy(update={"sources": sources})
    expected = all_batches(data, 1, epochs=2)
    assert sum(len(row) for batch in expected for row in batch) == 2 * (21 + 9)
    assert all_batches(data, 4, epochs=2) == expected
    streams = [open_rank(data, rank, 2, epochs=2) for rank in range(2)]
    begun = [batch for _, batch in zip(range(2), global_batches(streams), strict=False)]
    resumed = open_rank(data, epochs=2)
    resumed.load_state_dict(merge_states(stream.state_dict() for stream in streams))
    assert begun + list(global_batches([resumed])) == expected
    endless = open_rank(data, epochs=None)
    assert all(all(endless.next_rows()) for _ in range(20))
    assert not endless.exhausted


def broken_set(folder: Path, num_good: int, bad: dict[str, dict[str, bytes]]) -> Path:
    folder.mkdir()
    good = [(f"good{n:03d}", caption_sample(n)) for n in range(num_good)]
    write_tar(folder / "a.tar", [*good, *bad.items()])
    build_index(folder)
    return folder


BAD = {
    "cut": {"png": image_bytes()[:200], "txt": b"a"},
    "mute": {"png": image_bytes()},
    "shape": {"png": image_bytes(), "json": b"[1, 2]"},
    "empty": {"png": image_bytes(), "txt": b""},
    "tagless": {"png": image_bytes(), "json": b'{"conversations": [{"from": "human", "value": "a"}]}'},
    "latin": {"txt": b"\xff\xfe\xff"},
    "no-image": {"png": b"not an image", "txt": b"a"},
    "pickle": {"pyd": b"cos\nsystem\n(S'touch /tmp/owned'\ntR.", "txt": b"text only"},
}


def test_bad_samples_are_named_counted_and_replaced(tmp_path: Path) -> None:
    path = broken_set(tmp_path / "set", 30, BAD)
    quarantine = tmp_path / "quarantine.jsonl"
    stream = open_rank(config(path), num_slots=2, quarantine=quarantine)
    batches = list(global_batches([stream]))
    seen = [key for batch in batches for row in batch for key in row]
    assert sorted(seen) == sorted([f"good{n:03d}" for n in range(30)] + ["pickle"])
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {line["key"] for line in lines} == set(BAD) - {"pickle"}
    assert all(line["shard"] == "a.tar" and line["reason"] for line in lines)
    assert stream.num_bad == len(lines) == 7


def test_a_full_disk_under_the_quarantine_costs_no_row_and_is_said_before_a_state_relies_on_it(tmp_path: Path) -> None:
    path = broken_set(tmp_path / "set", 30, BAD)
    stream = open_rank(config(path), num_slots=2, quarantine=Path("/dev/full"))
    assert sum(len(row) for batch in global_batches([stream]) for row in batch) == 31
    with pytest.raises(OSError, match="No space left"):
        stream.sync()


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    path = broken_set(tmp_path / "set", 4, {f"bad{n}": BAD["cut"] for n in range(12)})
    with pytest.raises(InputError, match=r"cannot be used, more than 5%"):
        list(global_batches([open_rank(config(path), num_slots=2, epochs=8)]))


def test_a_slot_without_a_usable_sample_stops_the_run(tmp_path: Path) -> None:
    path = broken_set(tmp_path / "set", 0, {f"bad{n}": BAD["cut"] for n in range(3)})
    with pytest.raises(InputError, match="without a usable sample"):
        open_rank(config(path, bad_share_limit=1.0), num_slots=1, epochs=None).next_rows()


def test_too_long_is_skipped_and_counted_or_an_error(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "long", [3], words=80)
    data = config(folder, tmp_path / "long")
    stream = open_rank(data)
    seen = [key for batch in global_batches([stream]) for row in batch for key in row]
    assert (len(seen), stream.num_too_long, stream.num_bad) == (21, 3, 0)
    with pytest.raises(InputError, match="more than max_length 256"):
        list(global_batches([open_rank(data.model_copy(update={"too_long": "error"}))]))


class Counting(SampleOrder):
    """Counts how often each draw is resolved."""

    def resolve(self, slot: int, n: int) -> SampleRef:
        self.counts = getattr(self, "counts", Counter())
        self.counts[slot, n] += 1
        return super().resolve(slot, n)


class Inline(Fetcher):
    """Has workers as far as the stream can tell, and encodes when the result is asked for."""

    begun: list[SampleRef]

    def prefetch(self, ref: SampleRef) -> None:
        self.begun.append(ref)

    def result(self, ref: SampleRef) -> Result:
        return self._encode(ref)


@pytest.mark.parametrize("packing", PACKINGS, ids=PACKING_NAMES)
def test_each_draw_is_resolved_once_and_begun_ahead_of_time(folder: Path, packing: Any) -> None:
    plain = open_rank(config(folder, packing=packing))
    order = Counting(plain.order.indexes, plain.order.plan, plain.order.identity)
    fetcher = Inline(plain._fetcher._encode, num_workers=2)
    fetcher.begun = []
    stream = RowStream(order, fetcher, slots=plain.slots, packing=packing, epochs=1)
    assert list(global_batches([stream])) == all_batches(config(folder, packing=packing), 1)
    assert set(order.counts.values()) == {1}
    assert len(order.counts) == len(set(fetcher.begun)) == len(fetcher.begun) == 21


def test_a_state_as_it_has_always_been_written_is_read(folder: Path) -> None:
    """Slot 0 has one sample waiting in an open pack; names and keys are those on disk."""
    data = config(folder, packing=RowPacking(row_tokens=400, lookahead=3))
    stream = open_rank(data, num_slots=2, epochs=2)
    slots = {"0": (5, [4]), "1": (4, [])}
    counts = {"num_bad": 0, "num_too_long": 0, "num_shrunk": 0}
    state = {
        "version": 2,
        "fingerprint": stream.order.identity.fingerprint,
        "seed": 3,
        "num_slots": 2,
        "excluded": [["a.tar", "000000"]],
        "slots": {name: {"next": n, "open": waiting, **counts} for name, (n, waiting) in slots.items()},
    }
    stream.load_state_dict(state)
    assert json.loads(json.dumps(stream.state_dict())) == state
    first = stream.next_rows()[0][0]
    assert (first.ref.slot, first.ref.n) == (0, 4)


def test_a_state_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", [3])
    state = open_rank(config(folder)).state_dict()
    with pytest.raises(InputError, match="fingerprint"):
        open_rank(config(tmp_path / "other")).load_state_dict(state)
    with pytest.raises(InputError, match="seed"):
        open_rank(config(folder), seed=4).load_state_dict(state)
    with pytest.raises(InputError, match="num_slots"):
        open_rank(config(folder), num_slots=4).load_state_dict(state)
    with pytest.raises(InputError, match="version 9"):
        open_rank(config(folder)).load_state_dict(state | {"version": 9})
    with pytest.raises(InputError, match="lacks slot 4"):
        open_rank(config(folder), 1, 2).load_state_dict(open_rank(config(folder), 0, 2).state_dict())


def test_resuming_at_a_million_draws_reads_no_more_than_at_the_start(folder: Path) -> None:
    """Counted, not timed: the samples that are encoded until the first rows are out."""

    def encoded_until_first_rows(n: int) -> int:
        stream = open_rank(config(folder), epochs=None)
        state = stream.state_dict()
        for slot in state["slots"].values():
            slot["next"] = n
        stream.load_state_dict(state)
        stream.next_rows()
        return stream.num_drawn - 8 * n

    assert encoded_until_first_rows(1_000_000) == encoded_until_first_rows(0) == 8


def test_workers_load_neither_torch_nor_transformers() -> None:
    """They would take seconds and hundreds of megabytes in every worker."""
    program = (
        "import sys; import data_pipeline.encode, data_pipeline.fetch, data_pipeline.remote;"
        "print(sorted({'torch', 'transformers', 'webdataset', 'pandas', 'deepspeed'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert answer.stdout.strip() == "[]"


def draw_until_it_raises(stream: RowStream, seen: list[str]) -> None:
    while not stream.exhausted:
        seen += [sample.key for row in stream.next_rows() for sample in row]


@pytest.mark.parametrize("packing", [PadPacking(), RowPacking(row_tokens=64, lookahead=2)], ids=["pad", "pack"])
def test_a_set_that_goes_away_costs_no_sample(tmp_path: Path, packing: Any) -> None:
    """A disk that is unmounted while a run reads from it: the rows of that batch are drawn again when it is back."""
    folder = tmp_path / "set"
    write_set(folder, [3] * 9)
    quarantine, data = tmp_path / "quarantine.jsonl", config(folder, packing=packing, max_length=64)
    stream, seen = open_rank(data, num_slots=2, quarantine=quarantine), list[str]()
    seen += [sample.key for row in stream.next_rows() for sample in row]
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(AwayError, match=r"set: No such file or directory, though the set was there"):
        draw_until_it_raises(stream, seen)
    stream.take_back()
    state = stream.state_dict()
    (tmp_path / "elsewhere").rename(folder)
    again = open_rank(data, num_slots=2, quarantine=quarantine)
    again.load_state_dict(state)
    seen += keys_left(again)
    assert sorted(seen) == [f"{number:06d}" for number in range(27)]
    assert not quarantine.exists()
