"""The report as plain text, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.bootstrap import Interval
from tools.examples.report.stages import StageResult, losses_of_bundles

_COLUMNS = ("stage", "VQA accuracy %", "exchanged %", "gain, points", "CIDEr", "exchanged")


def text_report(stages: Mapping[str, StageResult], seconds: Mapping[str, float]) -> str:
    """A table of the stages, with 95 % intervals, then each step's duration."""
    rows = [_COLUMNS, *map(_row, stages.values())]
    lines = ["Held-out samples; exchanged = each sample shown another one's image; [95 % bootstrap interval]", ""]
    lines += aligned(rows)
    for bundle, stage, difference in losses_of_bundles(stages):
        lines += ["", f"{bundle.model.title} minus {stage.model.short}: {signed(difference)} points"]
    lines += [line for stage in stages.values() for line in _on_images(stage)]
    width = max((len(name) for name in seconds), default=0)
    lines += ["", *(f"{name.ljust(width)}  {duration(value):>9}" for name, value in seconds.items())]
    return "\n".join(lines).rstrip() + "\n"


def _on_images(stage: StageResult) -> list[str]:
    """Image gain, where it was measured, and what to try where images are not looked at."""
    gain = measured(stage, "image_gain", "image_gain", shuffled=False)
    figure = [] if gain == "-" else [f"{stage.model.title}: image gain {gain} nats a token"]
    lines = [*figure, *([f"{stage.model.title}: {stage.advice}"] if stage.advice else [])]
    return ["", *lines] if lines else []


def _row(stage: StageResult) -> tuple[str, ...]:
    gain = stage.gain()
    return (
        stage.model.title,
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
    """`+1.2 [+0.3, +2.1]`: a difference with its interval."""
    return f"{interval.estimate:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def duration(seconds: float) -> str:
    """Seconds in words: `12.3 s` below a minute, `2 min 05 s` above."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table; the first row is its heading, underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
