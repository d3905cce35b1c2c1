"""Opening an index of ten million samples: how long it takes, how much memory, how much disk.

Owns a synthetic index, written straight as arrays: what is measured is opening and looking up, in a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.index import ARRAYS
from data_pipeline.index_build import ShardTable, write_index
from data_pipeline.index_meta import INDEX_FOLDER, META_FILE
from models.common.documents import read_value

if TYPE_CHECKING:
    from tools.dev.bench.measure import Row

NUM_SAMPLES = 10_000_000
_SHARD_SAMPLES = 1000

_PROGRAM = """
import sys, time
from data_pipeline.index import ShardIndex
cpu, wall = time.process_time(), time.perf_counter()
index = ShardIndex.open(sys.argv[1])
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
assert index.entry(len(index) - 1).key == "777777777" and index.entry(0).shard == "s0.tar"
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(cpu, wall, int(peak) * 1024)
"""


@dataclass(frozen=True, slots=True)
class Opening:
    """The cost of opening an index and looking up its first and its last sample."""

    cpu_s: float
    wall_s: float
    memory_bytes: int
    """The most that the process ever held, Python and its libraries included."""
    disk_bytes: int


def write_synthetic(folder: Path, num_samples: int = NUM_SAMPLES, *, per_shard: int = _SHARD_SAMPLES) -> None:
    """An index of samples with two members and keys of nine letters each; no tars.

    Only the first sample and the last have rows that are not zero: the files are sparse, so that an index of a billion
    samples, 77 GB, takes none of it.
    """
    write_index(folder, [ShardTable("a.tar", 0, ["k"], [1], [(0, 0, 0, "txt", 0, 0)])])
    place = folder / INDEX_FOLDER
    lengths = {"samples": num_samples + 1, "members": 2 * num_samples, "keys": num_samples * 9}
    arrays = {
        name: np.lib.format.open_memmap(place / f"{name}.npy", "w+", ARRAYS[name], (length,))
        for name, length in lengths.items()
    }
    for number in (0, 1, num_samples - 1, num_samples):
        arrays["samples"][number] = (2 * number, 9 * number)
    arrays["keys"][-9:] = ord("7")
    for array in arrays.values():
        array.flush()
    meta = folder / META_FILE
    shards = [
        {"name": f"s{n}.tar", "num_bytes": 1 << 20, "num_samples": per_shard} for n in range(num_samples // per_shard)
    ]
    sizes = {name: (place / f"{name}.npy").stat().st_size for name in arrays}
    meta.write_text(json.dumps(read_value(meta) | {"shards": shards, "array_bytes": sizes}))


def measure_opening(folder: Path) -> Opening:
    """Open the index in a fresh process, so that seconds and memory are those of opening alone."""
    command = [sys.executable, "-c", _PROGRAM, str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    disk = sum(path.stat().st_size for path in (folder / INDEX_FOLDER).iterdir())
    return Opening(float(answer[0]), float(answer[1]), int(answer[2]), disk)


def index_rows() -> list[Row]:
    """Time and memory; the peer's column holds the limits."""
    from tools.dev.bench.measure import row

    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder))
        found = measure_opening(Path(folder))
    what = f"index of {NUM_SAMPLES:,} samples"
    return [
        row(f"{what} opened (peer: the limit)", "seconds", found.wall_s, 1.0, ["numpy"]),
        row(f"{what}: memory (peer: the limit)", "GB", found.memory_bytes / 1e9, 1.0, ["numpy"]),
    ]
