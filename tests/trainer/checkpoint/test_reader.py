"""A rank reads what it needs of a checkpoint: the same values whoever wrote it, each file opened once."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer.checkpoint.piecewise as piecewise
import trainer.checkpoint.verify as verify
from models.common.errors import InputError
from models.common.source import sha256_of
from tests.support.checkpoints import whole_fragments
from tests.support.paths import REPOSITORY
from trainer.checkpoint.format import Fragment, commit, fault_of, name_of, take_rank_shard
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.verify import agreed_newest, check_sound
from trainer.distributed.context import DistributedContext

SHAPES = {"a.weight": (7, 3), "a.bias": (5,), "b.weight": (2, 2, 2), "c": ()}
VALUES = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}


def partitioned(rank: int, world_size: int) -> Iterator[Fragment]:
    """A rank's slices under ZeRO-3: of every parameter the same number of elements, padded."""
    for name, value in VALUES.items():
        num_padded = -(-value.numel() // world_size)
        yield from fragment(name, rank * num_padded, (rank + 1) * num_padded)


def sliced(rank: int, world_size: int) -> Iterator[Fragment]:
    """A rank's slices under ZeRO-2: a range of all parameters end to end."""
    share, place = -(-sum(value.numel() for value in VALUES.values()) // world_size), 0
    for name, value in VALUES.items():
        yield from fragment(name, rank * share - place, (rank + 1) * share - place)
        place += value.numel()


def fragment(name: str, start: int, stop: int) -> Iterator[Fragment]:
    flat = VALUES[name].reshape(-1)
    start, stop = max(0, start), min(stop, len(flat))
    if start < stop:
        values = flat[start:stop]
        yield Fragment(name, SHAPES[name], start, values, {"exp_avg": values * 2, "exp_avg_sq": values * 3})


def write(root: Path, world_size: int, cut: Any, step: int = 1) -> Path:
    """What `world_size` ranks write, one after the other."""
    temporary, files = root / ".step.tmp", dict[str, Any]()
    for rank in range(world_size):
        ranks = DistributedContext(rank, world_size)
        inherited = whole_fragments({"frozen": torch.ones(3, dtype=torch.bfloat16)}) if rank == 0 else []
        files |= take_rank_shard(cut(rank, world_size), inherited, ranks, {}).write(temporary)
    commit(temporary, root / name_of(step), {"consumed": {"steps": step}}, files)
    return root / name_of(step)


def opened(work: Any) -> list[str]:
    """The files of ranks that are opened meanwhile."""
    names, watching = [], [True]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and "rank_" in str(arguments[0]):
            names.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)
    work()
    watching.clear()
    return names


@pytest.mark.parametrize("cut", [partitioned, sliced])
@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
@pytest.mark.parametrize("limit", [1000, 2])
def test_what_any_number_of_ranks_wrote_is_read_whole_and_in_slices(
    tmp_path: Path, cut: Any, world_size: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piecewise, "MAX_CALL_PIECES", limit)
    monkeypatch.setattr(piecewise, "MAX_CALL_BYTES", 12 * limit)
    reader = CheckpointReader.open(write(tmp_path, world_size, cut))
    assert {name: reader.shape(name) for name in SHAPES} == SHAPES
    assert torch.equal(reader.weight("frozen"), torch.ones(3))
    for name, value in VALUES.items():
        assert torch.equal(reader.weight(name), value)
        assert torch.equal(reader.read("exp_avg_sq", name, 0, value.numel()), value.reshape(-1) * 3)
    assert torch.equal(reader.read("exp_avg", "a.weight", 4, 11), VALUES["a.weight"].reshape(-1)[4:15] * 2)

    for other in (1, 3, 7):  # restored by another number of ranks
        for rank in range(other):
            held = list(partitioned(rank, other))
            found = [(each.name, each.start, torch.zeros_like(each.weight)) for each in held]
            reader.fill("exp_avg", found)
            for each, (_, _, values) in zip(held, found, strict=True):
                assert torch.equal(values, each.moments["exp_avg"])


def test_each_file_is_opened_once_and_only_where_it_is_needed(tmp_path: Path) -> None:
    directory = write(tmp_path, 8, partitioned)
    reader = CheckpointReader.open(directory, verify=False)
    assert opened(lambda: CheckpointReader.open(directory, verify=False)) == []
    whole: list[tuple[str, int, Tensor]] = [(name, 0, torch.empty(math.prod(s))) for name, s in SHAPES.items()]
    assert opened(lambda: reader.fill("weight", whole)) == [
        f"rank_{rank:05d}_of_00008.safetensors" for rank in range(8)
    ]
    own = [(each.name, each.start, torch.empty_like(each.weight)) for each in partitioned(3, 8)]
    assert opened(lambda: reader.fill("exp_avg", own)) == ["rank_00003_of_00008.safetensors"]


def test_a_tensor_of_another_dtype_is_filled_by_conversion(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 3, partitioned))
    half, exact = torch.empty(21, dtype=torch.bfloat16), torch.empty(5)
    reader.fill("weight", [("a.weight", 0, half), ("a.bias", 0, exact)])
    assert torch.equal(half, VALUES["a.weight"].reshape(-1).to(torch.bfloat16))
    assert torch.equal(exact, VALUES["a.bias"])


def test_what_no_file_holds_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 2, partitioned))
    with pytest.raises(InputError, match="it does not hold other"):
        reader.fill("weight", [("other", 0, torch.empty(1))])
    with pytest.raises(InputError, match=r"exp_avg of frozen has 0 of 3 elements"):
        reader.read("exp_avg", "frozen", 0, 3)
    with pytest.raises(InputError, match=r"never of a\.bias has 0 of 5 elements"):
        reader.read("never", "a.bias", 0, 5)


def test_a_checkpoint_of_version_1_is_read_as_before() -> None:
    """tests/support/fixtures/run_0_1 was written by two ranks of version 0.1."""
    from safetensors.torch import load_file

    directory = REPOSITORY / "tests/support/fixtures/run_0_1/run/align/checkpoints"
    (checkpoint,) = directory.iterdir()
    reader = CheckpointReader.open(checkpoint)
    parts = [load_file(file) for file in sorted(checkpoint.glob("rank_*.safetensors"))]
    assert len(parts) == 2
    for name in reader.names():
        for kind in ("weight", "exp_avg"):
            pieces = [part[f"{kind}/{name}"] for part in parts if f"{kind}/{name}" in part]
            expected = torch.cat(pieces)
            assert torch.equal(reader.read(kind, name, 0, len(expected)), expected), (kind, name)


def test_files_are_hashed_once_over_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, hashed = write(tmp_path, 8, partitioned), list[str]()

    def note(file: Path) -> str:
        hashed.append(file.name)
        return sha256_of(file)

    monkeypatch.setattr("trainer.checkpoint.format.sha256_of", note)
    assert [fault_of(directory, (rank, 4)) for rank in range(4)] == [None] * 4
    others = {"COMMIT", "manifest.json"}
    assert sorted(hashed) == sorted(path.name for path in directory.iterdir() if path.name not in others)


def test_a_fault_that_one_rank_finds_is_every_rank_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = write(tmp_path, 4, partitioned, 1), write(tmp_path, 4, partitioned, 2)
    spoilt = last / "rank_00002_of_00004.safetensors"
    content = bytearray(spoilt.read_bytes())
    content[-1] ^= 1
    spoilt.write_bytes(content)

    def gather(ranks: DistributedContext, value: Any) -> list[Any]:
        if isinstance(value, list):
            return [value]
        return [fault_of(tried[-1], (rank, 4)) for rank in range(4)]

    tried: list[Path] = []
    real = verify.agreed_fault

    def agreed(directory: Path, ranks: DistributedContext) -> str | None:
        tried.append(directory)
        return real(directory, ranks)

    monkeypatch.setattr(verify, "agreed_fault", agreed)
    monkeypatch.setattr(DistributedContext, "gather", gather)
    found, skipped = agreed_newest(tmp_path, DistributedContext(0, 4))
    assert found == first
    assert len(skipped) == 1
    assert "rank_00002_of_00004.safetensors has changed" in skipped[0]
    with pytest.raises(InputError, match="has changed since it was written; use another checkpoint"):
        check_sound(last, DistributedContext(1, 4))


def test_a_checkpoint_without_some_parameters_reads_the_others(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 3, partitioned))
    fewer = reader.without("a", ".")
    assert set(fewer.names()) == {"b.weight", "c", "frozen"}
    assert torch.equal(fewer.weight("b.weight"), VALUES["b.weight"])
    with pytest.raises(InputError, match=r"it does not hold a\.bias"):
        fewer.weight("a.bias")
    assert torch.equal(reader.weight("a.bias"), VALUES["a.bias"])
