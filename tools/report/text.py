"""The report as plain text: what a terminal shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.bootstrap import Interval
from tools.report.stages import STAGES, StageResult, change

_COLUMNS = ("stage", "VQA accuracy %", "exchanged %", "gain, points", "CIDEr", "exchanged")


def text_report(stages: Mapping[str, StageResult], seconds: Mapping[str, float]) -> str:
    """A table of the stages, with 95 % intervals, then what took how long."""
    rows = [_COLUMNS, *(_row(name, stage) for name, stage in stages.items())]
    lines = ["Held-out samples; exchanged = each sample shown another one's picture; [95 % bootstrap interval]", ""]
    lines += _aligned(rows)
    if "lora" in stages and "nf4" in stages and (difference := change(stages["nf4"], stages["lora"])):
        lines += ["", f"NF4 bundle minus LoRA: {signed(difference)} points"]
    width = max((len(name) for name in seconds), default=0)
    lines += ["", *(f"{name.ljust(width)}  {duration(value):>9}" for name, value in seconds.items())]
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, stage: StageResult) -> tuple[str, ...]:
    gain = stage.gain()
    return (
        STAGES[name],
        measured(stage, "vqa", "vqa_accuracy", shuffled=False),
        measured(stage, "vqa", "vqa_accuracy", shuffled=True),
        "-" if gain is None else signed(gain),
        measured(stage, "caption", "CIDEr", shuffled=False),
        measured(stage, "caption", "CIDEr", shuffled=True),
    )


def measured(stage: StageResult, task: str, metric: str, *, shuffled: bool) -> str:
    """A figure with its interval, or a dash."""
    value = stage.metric(task, metric, shuffled=shuffled)
    if value is None:
        return "-"
    digits = 1 if metric == "vqa_accuracy" else 3
    interval = stage.interval(task, metric, shuffled=shuffled)
    span = f" [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{span}"


def signed(interval: Interval) -> str:
    """A difference with its interval."""
    return f"{interval.estimate:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
