"""What a run will take on this machine, from its rehearsal: the same commands over a few steps and photos.

    samples/s of each stage, after its first step --> epochs of all photos
    seconds of a short evaluation and of a longer one --> the scores of all models

Owns the arithmetic and its lines. Also which precision this machine's processor computes fast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from models.common.files import read_lines
from tools.examples.photos.steps import SCORED, SCORES, Photos, recipe_arguments
from tools.examples.report.text import duration

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""What Linux calls units that multiply bfloat16; without them torch converts each operand."""


def precision_of(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """ "bf16" where this processor has units for it, else "fp32", which is the faster one there."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "fp32"
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "bf16" if BF16_FLAGS & set(flags.split()) else "fp32"


@dataclass(frozen=True)
class Forecast:
    """Seconds of what is still to come."""

    align_s: float
    lora_s: float
    scores_s: float

    @property
    def total_s(self) -> float:
        """Of all of it."""
        return self.align_s + self.lora_s + self.scores_s

    def line(self, precision: str) -> str:
        """What is said before the training begins."""
        return (
            f"on this machine, in {precision}: align about {duration(self.align_s)}, LoRA {duration(self.lora_s)},"
            f" merging and scoring {duration(self.scores_s)}; together {duration(self.total_s)}"
        )


def read_forecast(photos: Photos, seconds: Mapping[str, float]) -> Forecast:
    """From the rehearsal's logs; `seconds` are those of its commands.

    A command's own start is counted as often as it will be made again: two stages and one resumption, three merges,
    three evaluations, two at a time.
    """
    from trainer.config.recipe import load_recipe

    recipe = load_recipe(*_split(recipe_arguments(photos)))
    num_samples = len(json.loads((photos.run / "split" / "train.json").read_text(encoding="utf-8")))
    stages, stepping_s = [], 0.0
    for name in ("align", "lora"):
        rows = [row for row in read_lines(photos.rehearsal / name / "metrics.jsonl") if "samples_per_s" in row]
        rate = median(float(row["samples_per_s"]) for row in rows[1:] or rows)
        global_rows = recipe.stage(name).batch.global_rows
        stepping_s += photos.sizes.rehearsal_steps * global_rows / rate
        stage = recipe.stage(name).duration
        samples = {"epochs": num_samples * stage.count, "steps": stage.count * global_rows}.get(stage.unit, stage.count)
        stages.append(samples / rate)
    start_s = max(0.0, seconds["rehearsal"] - stepping_s) / 2
    (few, more), (few_s, more_s) = photos.sizes.num_rehearsed, (seconds[name] for name in SCORES)
    photo_s = max(0.0, more_s - few_s) / (more - few)
    scored_s = more_s + (photos.sizes.num_held_out - more) * photo_s
    scores_s = (len(SCORED) * scored_s + 3 * seconds["its bundle"]) / 2
    return Forecast(stages[0] + start_s, stages[1] + 2 * start_s, scores_s)


def _split(arguments: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    return Path(arguments[0]), arguments[1:]
