"""The report's drawings: accuracies as dots on a scale, loss as a curve.

Owns: HTML and inline SVG of both. Text is HTML at its own size and only lines are SVG that stretches, so a drawing is
as legible on a phone as on a desk. Colours come from the page's style (`tools.examples.report.style`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tools.examples.report.stages import StageResult

_TICKS = (0, 25, 50, 75, 100)
_MAX_POINTS = 400
_SMOOTHING = 1 / 25
"""Share of a curve that one point of its running mean covers."""


def dot_plot(stages: Mapping[str, StageResult]) -> str:
    """VQA accuracy per stage on one scale: filled dot with the right image, ring with another's, whiskers 95 %."""
    rows = "".join(map(_dot_row, stages.values()))
    ticks = "".join(f'<span style="left:{tick}%">{tick}</span>' for tick in _TICKS)
    lines = "".join(f'<i style="left:{tick}%"></i>' for tick in _TICKS)
    return f"""<div class="dots" role="img" aria-label="VQA accuracy of each stage, with the right and with exchanged
 images; the table below holds the same figures">
<div class="dot-grid">{lines}</div>{rows}<div class="dot-axis">{ticks}</div></div>"""


def _dot_row(stage: StageResult) -> str:
    right = stage.metric("vqa", "vqa_accuracy", shuffled=False)
    blind = stage.metric("vqa", "vqa_accuracy", shuffled=True)
    if right is None:
        return ""
    marks = _whisker(stage.interval("vqa", "vqa_accuracy", shuffled=False), "right")
    if blind is not None:
        low, high = sorted((right, blind))
        marks = f'<i class="span" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>{marks}'
        marks += _whisker(stage.interval("vqa", "vqa_accuracy", shuffled=True), "blind")
        marks += f'<b class="blind" style="left:{blind:.2f}%" title="exchanged: {blind:.1f} %"></b>'
    marks += f'<b class="right" style="left:{right:.2f}%" title="right image: {right:.1f} %"></b>'
    is_below_blind = blind is not None and 14 < right < blind
    side = "left" if right > 85 or is_below_blind else "right"
    value = f'<span class="value {side}" style="left:{right:.2f}%">{right:.1f}</span>'
    if side == "left" and blind is not None and right - blind < 14:
        value = ""  # the ring would lie under the figure
    return f'<div class="dot-row"><span>{escape(stage.model.title)}</span><div class="track">{marks}{value}</div></div>'


def _whisker(interval: Mapping[str, float] | None, kind: str) -> str:
    if interval is None:
        return ""
    low, high = interval["low"], interval["high"]
    return f'<i class="whisker {kind}" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'


def bar(percent: float, kind: str) -> str:
    """A thin bar of a share in per cent."""
    return f'<span class="bar"><i class="{kind}" style="width:{percent:.1f}%"></i></span>'


@dataclass(frozen=True)
class _LogScale:
    low: float
    high: float

    def percent(self, value: float) -> float:
        """Distance from the top of the axis in per cent: CSS and SVG count downwards."""
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return 100 * (1 - share)


def loss_curve(steps: Sequence[int], losses: Sequence[float], label: str) -> str:
    """Loss by step on a logarithmic scale: every logged value pale, their running mean strong."""
    kept = [(step, loss) for step, loss in zip(steps, losses, strict=True) if loss > 0 and math.isfinite(loss)]
    if len(kept) < 2:
        return '<p class="note">Too few steps were logged to draw a curve.</p>'
    smooth = running_mean([loss for _, loss in kept], max(1, round(len(kept) * _SMOOTHING)))
    low, high = min(loss for _, loss in kept), max(loss for _, loss in kept)
    ticks = log_ticks(low, high)
    scale = _LogScale(ticks[0], ticks[-1])
    first, last = kept[0][0], kept[-1][0]
    raw = _points([(step, loss) for step, loss in kept], first, last, scale)
    mean = _points([(step, value) for (step, _), value in zip(kept, smooth, strict=True)], first, last, scale)
    lines = "".join(
        f'<line x1="0" x2="100" y1="{scale.percent(tick):.2f}" y2="{scale.percent(tick):.2f}"/>' for tick in ticks
    )
    names = "".join(f'<span style="top:{scale.percent(tick):.2f}%">{tick:g}</span>' for tick in ticks)
    end = f'<b style="top:{scale.percent(smooth[-1]):.2f}%"></b>'
    aria = escape(f"{label}: loss from {smooth[0]:.3g} to {smooth[-1]:.3g} over {last} steps")
    return f"""<div class="curve" role="img" aria-label="{aria}"><div class="y">{names}</div><div class="plot">
<svg viewBox="0 0 100 100" preserveAspectRatio="none"><g class="grid">{lines}</g>
<polyline class="raw" points="{raw}"/><polyline class="mean" points="{mean}"/></svg>{end}</div>
<div class="x"><span>step {first}</span><span>{last}</span></div></div>"""


def _points(values: Sequence[tuple[int, float]], first: int, last: int, scale: _LogScale) -> str:
    """An SVG point list of at most `_MAX_POINTS`, the last one always among them."""
    stride = max(1, math.ceil(len(values) / _MAX_POINTS))
    kept = [*values[:-1:stride], values[-1]]
    return " ".join(f"{100 * (step - first) / max(1, last - first):.2f},{scale.percent(v):.2f}" for step, v in kept)


def running_mean(values: Sequence[float], half_window: int) -> list[float]:
    """Mean of the values within `half_window` places, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        start, end = max(0, place - half_window), min(len(values), place + half_window + 1)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten from the last at or below `low` to the first at or above `high`."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [float(f"{lead}e{power}") for power in powers for lead in (1, 2, 5)]
    first = max(place for place, tick in enumerate(ticks) if tick <= low)
    last = min(place for place, tick in enumerate(ticks) if tick >= high)
    return ticks[first : max(last, first + 1) + 1]
