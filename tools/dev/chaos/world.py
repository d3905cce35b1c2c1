"""The chaos run's data and models: shards of the synthetic world and barely trained backbones, made in seconds."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

RECIPE = "recipes/llava15_tiny.yaml"
STAGE = "align"
GLOBAL_ROWS = 4


def make_world(folder: Path) -> None:
    """Make what is missing; every step is a command that a user could run."""
    from tools.examples.synthetic.__main__ import main as synthetic
    from tools.shards.__main__ import main as shards

    world = folder / "world"
    commands = {
        world: (synthetic, ["world", str(world), "--scenes", "400", "--held-out", "20"]),
        folder / "clip": (synthetic, ["clip", str(world), str(folder / "clip"), "--steps", "1", "--batch-size", "8"]),
        folder / "language": (synthetic, ["language", str(world), str(folder / "language"), "--steps", "1"]),
        folder / "shards": (
            shards,
            ["make", str(folder / "shards"), "--llava", str(world / "align.json"), "--images", str(world / "images")],
        ),
    }
    for made, (command, arguments) in commands.items():
        if not made.is_dir():
            with redirect_stdout(StringIO()):
                command(arguments)


def recipe_arguments(
    folder: Path, run: Path, *, steps: int, rank_timeout_s: float, address: str | None = None
) -> list[str]:
    """The training command's arguments for a run of `steps` steps with a checkpoint every second one.

    Args:
        address: where `folder` is served from; None: the shards are read from the disk.
    """
    stage = f"stages.{STAGE}"
    source = f"{stage}.data.sources.0"
    remote = [f"{source}.path={address}/shards", f"{source}.cache={folder / 'cache'}"] if address else []
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
        *remote,
    ]
