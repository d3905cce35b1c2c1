"""What a rank pays on 2 to 1,024 ranks, and an audit for 10^6 to 10^9 draws: `python -m tools.bench.scale`.

Simulated with the project's own code: one process does what one rank does, over files as all ranks write them. Network
and the file servers of a cluster are not in it; opens, bytes and creations are what they would be asked for.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from models.common.errors import run_cli
from models.common.files import write_json

RANKS = (2, 16, 128, 1024)
SLOTS = (32, 128, 512, 1024)
DRAWS = (10**6, 10**7, 10**8, 10**9)
LEDGER_RANKS = 128
SMALL_LAYERS, SMALL_WIDTH = 40, 64
"""A model of 362 small tensors: at 1,024 ranks 370,000 slices of a few hundred elements."""
PARTS = {
    "restore, ZeRO-2",
    "restore, ZeRO-3",
    "restore, ZeRO-3, small tensors",
    "draws",
    "handles",
    "ledger",
    "heartbeats",
}


def main(argv: list[str]) -> int:
    """Measure, print the table and write runs/bench/scale.json; returns 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(prog="tools.bench.scale", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/scale"), help="where the files lie meanwhile")
    parser.add_argument("--layers", type=int, default=8, help="of the model that is restored; 8 make 0.7 GB of weights")
    parser.add_argument("--width", type=int, default=1280, help="of that model")
    parser.add_argument("--draws", type=int, default=DRAWS[-1], help="the most that are audited")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scale.json"))
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    begun_s, found = time.monotonic(), {}
    try:
        for name, part in _parts(folder, arguments).items():
            found[name] = _timed(name, part)
            _write(arguments.out, found, time.monotonic() - begun_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    broken = [line for line, holds in _bounds(found) if not holds]
    print(f"written to {arguments.out} after {time.monotonic() - begun_s:.0f} s")
    for line in broken:
        print(f"DOES NOT HOLD: {line}")
    return 1 if broken else 0


def _write(out: Path, found: dict[str, dict[str, Any]], seconds: float) -> None:
    """What was measured so far; an interrupted run leaves it."""
    from tools.dev.bench.measure import device

    is_whole = found.keys() == PARTS
    bounds = dict(_bounds(found)) if is_whole else {}
    write_json(out, {"device": device(), "seconds": round(seconds), "parts": found, "bounds": bounds})


def _timed(name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    print(name, flush=True)
    begun_s = time.monotonic()
    found = part()
    found["seconds"] = round(time.monotonic() - begun_s)
    for what, values in found["rows"].items():
        shown, exponent = "  ".join(f"{value:>12,.6g}" for value in values), found["slopes"][what]
        print(f"  {what:<34} {shown}" + ("" if exponent is None else f"   slope {exponent:+.2f}"))
    return found


def _table(sizes: Sequence[int], measure: Callable[[int], dict[str, float]], unit: str) -> dict[str, Any]:
    """Rows of figures over sizes, and the exponent by which each grows; null where there is one size."""
    from tools.dev.bench.scale.cost import slope

    columns = []
    for size in sizes:
        begun_s = time.monotonic()
        columns.append(measure(size))
        print(f"  {size:,} {unit}: {time.monotonic() - begun_s:.0f} s", flush=True)
    rows = {what: [column[what] for column in columns] for what in columns[0]}
    slopes = {what: slope([float(size) for size in sizes], values) for what, values in rows.items()}
    return {unit: list(sizes), "rows": rows, "slopes": slopes}


def _parts(folder: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    draws = [number for number in DRAWS if number <= arguments.draws]
    size = arguments.layers, arguments.width
    small = SMALL_LAYERS, SMALL_WIDTH
    return {
        "restore, ZeRO-2": lambda: _table(RANKS, lambda each: _restore(folder, 2, each, *size), "ranks"),
        "restore, ZeRO-3": lambda: _table(RANKS, lambda each: _restore(folder, 3, each, *size), "ranks"),
        "restore, ZeRO-3, small tensors": lambda: _table(
            RANKS, lambda each: _restore(folder, 3, each, *small), "ranks"
        ),
        "draws": lambda: _draws(folder),
        "handles": lambda: _table(SLOTS, lambda each: _handles(folder / str(each), each), "slots a rank"),
        "ledger": lambda: _table(draws, lambda each: _audit(folder, each), "draws"),
        "heartbeats": lambda: _table(RANKS, lambda each: _beats(folder / f"beats{each}", each), "ranks"),
    }


def _restore(folder: Path, zero: int, num_ranks: int, num_layers: int, width: int) -> dict[str, float]:
    from tools.dev.bench.scale import restore

    shapes = restore.shapes_of(num_layers, width)
    cost = restore.measure(folder / "checkpoint", zero, num_ranks, shapes)
    return {"opens": cost.opens, "GB read": cost.bytes_read / 1e9, "CPU s": cost.cpu_s}


def _draws(folder: Path) -> dict[str, Any]:
    from tools.dev.bench.index import write_synthetic
    from tools.dev.bench.scale.cost import in_child
    from tools.dev.bench.scale.reading import draws_of

    place = folder / "index"
    write_synthetic(place, 100_000_000, per_shard=10_000)

    def measure(num_ranks: int) -> dict[str, float]:
        first, rate = in_child(partial(draws_of, place, num_ranks, 40_000))
        return {"CPU s to the first draw": first.cpu_s, "draws a CPU second": rate}

    return _table(RANKS, measure, "ranks")


def _handles(folder: Path, num_slots: int) -> dict[str, float]:
    from tools.dev.bench.scale.cost import in_child
    from tools.dev.bench.scale.reading import reads_of

    folder.mkdir()
    found = in_child(lambda: reads_of(folder, num_slots, num_draws=200))
    shutil.rmtree(folder)
    return {"opens a read": found.opens / found.num_reads, "handles": found.handles}


def _audit(folder: Path, num_draws: int) -> dict[str, float]:
    from tools.dev.bench.scale import ledgers

    size, cost = ledgers.measure(folder / "ledger", num_draws, LEDGER_RANKS)
    return {"bytes a draw": size, "audit, CPU s": cost.cpu_s, "audit, peak GB": cost.peak_bytes / 1e9}


def _beats(directory: Path, num_ranks: int) -> dict[str, float]:
    from tools.dev.bench.scale import beats

    return {name.replace("_", " "): value for name, value in asdict(beats.measure(directory, num_ranks)).items()}


def _bounds(found: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    """What must hold, and whether it does."""
    lines = []
    for part in ("restore, ZeRO-2", "restore, ZeRO-3"):
        seconds = dict(zip(found[part]["ranks"], found[part]["rows"]["CPU s"], strict=True))
        few, many = RANKS[1], RANKS[-1]
        line = f"{part}: at {many:,} ranks at most twice the CPU seconds of {few}"
        lines.append((line, seconds[many] <= 2 * seconds[few]))
    opens, peak = max(found["handles"]["rows"]["opens a read"]), max(found["ledger"]["rows"]["audit, peak GB"])
    created = max(found["heartbeats"]["rows"]["created a second"])
    return [
        *lines,
        (f"opens a read below 1 % up to {SLOTS[-1]:,} slots a rank", opens < 0.01),
        ("an audit's memory below 1 GB", peak < 1.0),
        ("files created below 10 a second", created < 10),
    ]


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
