"""What the chaos run trains: the small world's shards and backbones that have hardly been trained, in seconds."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

RECIPE = "recipes/llava15_tiny.yaml"
STAGE = "align"
GLOBAL_ROWS = 4


def make_world(folder: Path) -> None:
    """Make what is not there yet; every step is a command that a person could type."""
    from tools.shards.__main__ import main as shards
    from tools.toy.__main__ import main as toy

    world = folder / "world"
    commands = {
        world: (toy, ["world", str(world), "--scenes", "400", "--held-out", "20"]),
        folder / "clip": (toy, ["clip", str(world), str(folder / "clip"), "--steps", "1", "--batch-size", "8"]),
        folder / "language": (toy, ["language", str(world), str(folder / "language"), "--steps", "1"]),
        folder / "shards": (
            shards,
            ["make", str(folder / "shards"), "--llava", str(world / "align.json"), "--images", str(world / "images")],
        ),
    }
    for made, (command, words) in commands.items():
        if not made.is_dir():
            with redirect_stdout(StringIO()):
                command(words)


def words(folder: Path, run: Path, *, steps: int, rank_timeout_s: float) -> list[str]:
    """The training command's words for a run of so many steps, with a checkpoint every second one."""
    stage = f"stages.{STAGE}"
    return [
        RECIPE,
        "--stage",
        STAGE,
        f"run={run}",
        f"model.vision.path={folder / 'clip'}",
        f"model.language.path={folder / 'language'}",
        f"{stage}.data.sources.0.path={folder / 'shards'}",
        f"{stage}.duration={{unit: steps, count: {steps}}}",
        f"{stage}.batch={{global_rows: {GLOBAL_ROWS}, micro_rows: 2}}",
        f"{stage}.checkpoint={{every_steps: 2, keep: 2}}",
        f"{stage}.guard.rank_timeout_s={rank_timeout_s}",
        "tracking.log_every_steps=1",
    ]
