"""The ledger: bytes of a draw as 1,024 ranks write it, and the audit of 10^6 to 10^9 draws."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tools.dev.bench.scale.cost import Cost, cost_of, in_child
from trainer.ledger.audit import Records, settle
from trainer.ledger.blocks import ENDING, make_block
from trainer.ledger.restarts import FOLDER, HEAD, read_restarts

GLOBAL_ROWS = 4096
LINES_A_CHECKPOINT = 1000


def write(root: Path, num_draws: int, num_ranks: int) -> dict[str, Any]:
    """A ledger without trouble; each rank's lines are written before each checkpoint. The checkpoint's state."""
    directory, num_batches = root / f"{FOLDER}0001", num_draws // GLOBAL_ROWS
    directory.mkdir(parents=True)
    (directory / HEAD).write_text(f'{{"resumed_at": 0, "world_size": {num_ranks}}}')
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        list(pool.map(partial(_write_rank, directory, num_batches, num_ranks), range(num_ranks)))
    entries = {str(slot): {"next": num_batches, "open": []} for slot in range(GLOBAL_ROWS)}
    return {"consumed": {"batches": num_batches, "steps": num_batches}, "stream": {"slots": entries}}


def _write_rank(directory: Path, num_batches: int, num_ranks: int, rank: int) -> None:
    per_rank = GLOBAL_ROWS // num_ranks
    slots = np.arange(rank * per_rank, (rank + 1) * per_rank)
    with (directory / f"rank_{rank:05d}{ENDING}").open("wb") as stream:
        for first in range(0, num_batches, LINES_A_CHECKPOINT):
            batch = np.arange(first + 1, min(first + LINES_A_CHECKPOINT, num_batches) + 1)
            counts = [np.full(len(batch), per_rank), np.zeros(len(batch), np.int64)]
            slot, n = np.tile(slots, len(batch)), np.repeat(batch - 1, per_rank)
            stream.write(make_block([batch, batch, *counts], slot, n, []).to_bytes())


def measure(folder: Path, num_draws: int, num_ranks: int) -> tuple[float, Cost]:
    """Bytes of a draw, and the cost of an audit that finds everything clean."""
    state = in_child(lambda: write(folder, num_draws, num_ranks))
    try:
        size = sum(file.stat().st_size for file in folder.rglob("rank_*"))

        def work() -> None:
            account = settle("step", state, Records(read_restarts(folder)))
            assert account.is_clean

        cost: Cost = in_child(lambda: cost_of(work))
        return size / (num_draws // GLOBAL_ROWS * GLOBAL_ROWS), cost
    finally:
        shutil.rmtree(folder, ignore_errors=True)
