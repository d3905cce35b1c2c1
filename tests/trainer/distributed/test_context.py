"""The same ranks from every launcher, a share of the rows for each, and collectives that equal one process's."""

from __future__ import annotations

from typing import Any

import pytest

from models.common.errors import InputError
from tests.support.ranks import run_on_ranks
from trainer.distributed.context import DistributedContext, from_environment

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "20001"}


def test_every_launcher_gives_the_same_ranks() -> None:
    launched = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **ADDRESS}
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", **ADDRESS}
    assert from_environment(launched) == from_environment(srun) == DistributedContext(3, 8, 1)
    assert srun["RANK"] == "3"  # libraries read it too


def test_alone_is_one_rank_that_takes_no_port() -> None:
    environment: dict[str, str] = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert from_environment(environment) == DistributedContext()
    assert environment["MASTER_PORT"] == "0"


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "two"},
        {"RANK": "0"},
        {"RANK": "first", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ],
)
def test_variables_that_are_incomplete_or_wrong_are_named(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"MASTER_ADDR|RANK.*WORLD_SIZE"):
        from_environment(environment)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("num_rows", [0, 1, 8, 12])
def test_every_row_is_one_ranks_and_shares_are_even(world_size: int, num_rows: int) -> None:
    shares = [DistributedContext(rank, world_size).local_rows(num_rows) for rank in range(world_size)]
    assert [row for share in shares for row in share] == list(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def collect(ranks: DistributedContext) -> dict[str, Any]:
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    try:
        ranks.barrier()
        exact = float(2**51 + ranks.rank)
        return {
            "first": ranks.is_first,
            "sum": ranks.sum([ranks.rank + 1, 0.5, exact]),
            "gathered": ranks.gather({"rank": ranks.rank}),
        }
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_what_ranks_tell_each_other_is_the_same_on_all() -> None:
    first, second = run_on_ranks(2, collect)
    assert (first.pop("first"), second.pop("first")) == (True, False)
    assert first == second
    assert first == {"sum": [3.0, 1.0, 2.0**52 + 1], "gathered": [{"rank": 0}, {"rank": 1}]}


def test_alone_nothing_is_communicated() -> None:
    alone = DistributedContext()
    alone.barrier()
    assert alone.sum([1, 2.5]) == [1.0, 2.5]
    assert alone.gather("value") == ["value"]
