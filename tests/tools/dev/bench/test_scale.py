"""The simulation of many ranks, made small: every part is measured, and what must hold holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tools.dev.bench.scale import __main__ as command
from tools.dev.bench.scale import beats, restore
from tools.dev.bench.scale.cost import slope


@pytest.mark.slow
def test_every_part_is_measured_and_written(tmp_path: Path) -> None:
    """In a process of its own: an audit's memory is that of the whole process."""
    out, ranks, slots = tmp_path / "scale.json", (2, 16, 128), (32, 128)
    words = ["--folder", str(tmp_path / "files"), "--out", str(out), "--layers", "1", "--width", "64"]
    script = (
        "from tools.dev.bench.scale import __main__ as command\n"
        f"command.RANKS, command.SLOTS = {ranks}, {slots}\n"
        f"command.main({[*words, '--draws', '10000000']})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    parts, bounds = found["parts"], found["bounds"]
    assert set(parts) == command.PARTS
    assert parts["restore, ZeRO-3"]["ranks"] == list(ranks)
    assert parts["handles"]["slots a rank"] == list(slots)
    for num, opens in zip(ranks, parts["restore, ZeRO-3"]["rows"]["opens"], strict=True):
        assert num <= opens < num + 40, "each rank's file once, and a share of them once more to hash it"
    # seconds of a model this small are those of opening files, so what holds for seconds is not asked of it
    assert [holds for line, holds in bounds.items() if "CPU" not in line] == [True] * 3
    assert not (tmp_path / "files").exists()


def test_slices_of_all_ranks_are_every_element_once() -> None:
    shapes = restore.shapes_of(1, 8)
    for zero in (2, 3):
        for num_ranks in (1, 5, 64):
            held = dict.fromkeys(shapes, 0)
            for rank in range(num_ranks):
                for name, _, numel in restore.slices(zero, rank, num_ranks, shapes):
                    held[name] += numel
            assert held == {name: shape[0] * (shape[1] if shape[1:] else 1) for name, shape in shapes.items()}


def test_a_slope_is_the_exponent_of_growth() -> None:
    assert slope([1.0, 100.0], [3.0, 300.0]) == pytest.approx(1)
    assert slope([2.0, 32.0], [5.0, 5.0]) == pytest.approx(0)
    assert slope([1.0, 10.0], [1.0, 100.0]) == pytest.approx(2)
    assert command._table([7], lambda size: {"CPU s": float(size)}, "ranks") == {
        "ranks": [7],
        "rows": {"CPU s": [7.0]},
        "slopes": {"CPU s": None},
    }


def test_heartbeats_create_nothing_after_the_start(tmp_path: Path) -> None:
    found = beats.measure(tmp_path / "ranks", 64)
    assert (found.files, found.created_a_second) == (8, 0.0)
