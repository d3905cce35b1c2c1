"""The report as one self-contained HTML page: scores, training curves, and answered samples.

Owns: the sections and their text. Does not own the drawings (`tools.examples.report.charts`), the answers' cards
(`tools.examples.report.cards`) or the look (`tools.examples.report.style`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from tools.examples.report.cards import sample_sections
from tools.examples.report.charts import bar, dot_plot, loss_curve
from tools.examples.report.stages import StageResult, last_stage, losses_of_bundles
from tools.examples.report.style import CSS
from tools.examples.report.text import duration, measured, signed


@dataclass(frozen=True)
class Curve:
    """What a training stage logged: parallel steps and losses, and its speeds."""

    title: str
    """The stage, and the parts of the model that it trained."""
    steps: Sequence[int]
    losses: Sequence[float]
    samples_per_s: Sequence[float]
    tokens_per_s: Sequence[float]
    numerics: Sequence[str] = ()
    """What the comparison of its first gradient with fp32's found, and a warning where it was low."""


def page(
    title: str,
    stages: Mapping[str, StageResult],
    curves: Mapping[str, Curve],
    seconds: Mapping[str, float],
    *,
    seed: int,
) -> str:
    """The whole page. `stages` are in the order of the run."""
    body = [
        f'<p class="mark">Sightline</p><h1>{escape(title)}</h1>',
        _lead(stages),
        _tiles(stages, seconds),
        _accuracy_section(stages),
        _kinds_section(stages),
        curves_section(curves),
        *sample_sections(stages, seed),
        seconds_section(seconds),
        _method(stages),
    ]
    return framed(title, body)


def framed(title: str, body: Sequence[str]) -> str:
    """A whole page of sections, with the report's style; nothing is loaded from elsewhere."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Sightline</title><style>{CSS}</style></head>
<body><main>{"".join(body)}</main></body></html>
"""


def _lead(stages: Mapping[str, StageResult]) -> str:
    """The finding in a sentence or two."""
    stage = last_stage(stages)
    accuracy = stage.metric("vqa", "vqa_accuracy", shuffled=False)
    if accuracy is None:
        return ""
    when = stage.model.title[0].upper() + stage.model.title[1:]
    number = len(stage.samples("vqa"))
    text = f"{when}, the model answers <b class=seen>{accuracy:.1f} %</b> of {number:,} held-out questions right."
    blind = stage.metric("vqa", "vqa_accuracy", shuffled=True)
    if blind is not None:
        text += (
            f" Shown another question's image instead, it gets <b class=blind>{blind:.1f} %</b>: that much can be "
            "guessed without looking."
        )
    return f'<p class="lead">{text}</p>'


def _tiles(stages: Mapping[str, StageResult], seconds: Mapping[str, float]) -> str:
    stage = last_stage(stages)
    accuracy, gain = stage.metric("vqa", "vqa_accuracy", shuffled=False), stage.gain()
    tiles = []
    if accuracy is not None:
        tiles.append((f"{accuracy:.1f} <small>%</small>", f"VQA accuracy {stage.model.title}"))
    if gain is not None:
        tiles.append((f"{_minus(gain.estimate)} <small>points</small>", "above exchanged images"))
    for bundle, source, difference in losses_of_bundles(stages):
        what = f"{bundle.model.title} against {source.model.short}"
        tiles.append((f"{_minus(difference.estimate)} <small>points</small>", what))
    cider = stage.metric("caption", "CIDEr", shuffled=False)
    if cider is not None:
        tiles.append((f"{cider:.2f}", f"CIDEr {stage.model.title}"))
    if seconds:
        tiles.append((duration(total_seconds(seconds)), "for the whole chain"))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{escape(what)}</span></div>' for value, what in tiles)
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def _minus(value: float) -> str:
    """A signed number with a true minus sign."""
    return f"{value:+.1f}".replace("-", "−")


def _accuracy_section(stages: Mapping[str, StageResult]) -> str:
    """Dots where VQA was measured, and the table of all figures."""
    plot = ""
    if any(stage.result("vqa", shuffled=False) for stage in stages.values()):
        plot = f"""<div class="legend"><span><i class="seen"></i>right image</span><span><i class="blind"></i>another
 image</span><span><i class="whisker"></i>95 % interval</span></div>{dot_plot(stages)}"""
    return f"""<h2>Does it look at the image?</h2>
<p class="note">VQA accuracy in per cent. A model that ignores the image scores the same with any image.</p>
<div class="panel">{plot}<div class="wide">{_stage_table(stages)}</div></div>{_on_images(stages)}"""


def _on_images(stages: Mapping[str, StageResult]) -> str:
    """Image gain of each stage that has it, and what to try where images are not looked at."""
    lines = []
    for stage in stages.values():
        gain = measured(stage, "image_gain", "image_gain", shuffled=False)
        said = [] if gain == "-" else [f"image gain {gain} nats a token"]
        said += [stage.advice] if stage.advice else []
        lines += [f'<p class="note"><b>{escape(stage.model.title)}</b>: {escape("; ".join(said))}</p>'] if said else []
    return "".join(lines)


def _stage_table(stages: Mapping[str, StageResult]) -> str:
    rows = "".join(map(_stage_row, stages.values()))
    return f"""<table><thead><tr><th>stage</th><th>VQA accuracy %</th><th>exchanged</th><th>gain, points</th>
<th>CIDEr</th><th>exchanged</th></tr></thead><tbody>{rows}</tbody></table>"""


def _stage_row(stage: StageResult) -> str:
    gain = stage.gain()
    cells = [
        _cell(stage, "vqa", "vqa_accuracy", shuffled=False),
        _cell(stage, "vqa", "vqa_accuracy", shuffled=True),
        "–" if gain is None else f"{_minus(gain.estimate)}<small>{_minus(gain.low)} to {_minus(gain.high)}</small>",
        _cell(stage, "caption", "CIDEr", shuffled=False),
        _cell(stage, "caption", "CIDEr", shuffled=True),
    ]
    return f"<tr><th>{escape(stage.model.title)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _cell(stage: StageResult, task: str, metric: str, *, shuffled: bool) -> str:
    value = stage.metric(task, metric, shuffled=shuffled)
    if value is None:
        return "–"
    digits = 1 if metric == "vqa_accuracy" else 3
    interval = stage.interval(task, metric, shuffled=shuffled)
    span = f"<small>{interval['low']:.{digits}f} to {interval['high']:.{digits}f}</small>" if interval else ""
    return f"{value:.{digits}f}{span}"


def _kinds_section(stages: Mapping[str, StageResult]) -> str:
    """Accuracy by kind of question, at every stage and blind."""
    stage = last_stage(stages)
    by_kind = _by_kind(stage, shuffled=False)
    if len(by_kind) < 2:
        return ""
    blind = _by_kind(stage, shuffled=True)
    others = [other for other in stages.values() if other is not stage]
    columns = [_by_kind(other, shuffled=False) for other in others]
    head = "".join(f"<th>{escape(other.model.title)}</th>" for other in others)
    rows = ""
    for kind, values in sorted(by_kind.items(), key=lambda pair: -_mean(pair[1])):
        cells = _bar_cell(_mean(values), "seen")
        cells += _bar_cell(_mean(blind[kind]), "blind") if blind else ""
        cells += "".join(f"<td>{_mean(column[kind]):.1f}</td>" if column else "<td>–</td>" for column in columns)
        rows += f"<tr><th>{escape(kind)}</th><td>{len(values)}</td>{cells}</tr>"
    exchanged = f"<th>{escape(stage.model.title)}, exchanged</th>" if blind else ""
    return f"""<h2>By kind of question</h2><div class="panel"><div class="wide"><table><thead><tr>
<th>kind</th><th>questions</th><th>{escape(stage.model.title)} %</th>{exchanged}{head}</tr></thead><tbody>{rows}</tbody>
</table></div></div>"""


def _bar_cell(percent: float, kind: str) -> str:
    return f"<td>{bar(percent, kind)}<span>{percent:.1f}</span></td>"


def _by_kind(stage: StageResult, *, shuffled: bool) -> dict[str, list[float]]:
    """Per cents of every question, by its kind."""
    kinds: dict[str, list[float]] = {}
    for sample in stage.samples("vqa", shuffled=shuffled):
        if sample.get("question_type"):
            kinds.setdefault(sample["question_type"], []).append(100 * sample["accuracy"])
    return kinds


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def curves_section(curves: Mapping[str, Curve]) -> str:
    """Each training stage's loss; nothing where there are no curves."""
    if not curves:
        return ""
    panels = "".join(
        f'<div class="panel"><h3>{escape(curve.title)}</h3>'
        f'{loss_curve(curve.steps, curve.losses, name)}<p class="note" style="margin:0">{_speed(curve)}</p>'
        f"{_numerics(curve)}</div>"
        for name, curve in curves.items()
    )
    return f"""<h2>How it learnt</h2><p class="note">Training loss in nats per target token, on a logarithmic scale;
 pale: as logged, strong: running mean.</p><div class="curves">{panels}</div>"""


def _numerics(curve: Curve) -> str:
    return "".join(f'<p class="note" style="margin:0">{escape(line)}</p>' for line in curve.numerics)


def _speed(curve: Curve) -> str:
    parts = [f"{len(curve.losses):,} values logged"]
    if curve.samples_per_s:
        parts.append(f"{_rate(median(curve.samples_per_s))} samples/s")
    if curve.tokens_per_s:
        parts.append(f"{_rate(median(curve.tokens_per_s))} tokens/s")
    return ", ".join(parts) + (" (medians)" if len(parts) > 1 else "")


def _rate(value: float) -> str:
    """A speed: whole, or two digits of a slow one."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def total_seconds(seconds: Mapping[str, float]) -> float:
    """Seconds of the whole chain: the entry `total`, else the sum of all steps."""
    return seconds["total"] if "total" in seconds else sum(seconds.values())


def seconds_section(seconds: Mapping[str, float]) -> str:
    """How long each step took, and all of them; nothing where none was measured."""
    steps = {name: value for name, value in seconds.items() if name != "total"}
    if not steps:
        return ""
    longest = max(steps.values()) or 1.0
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td style="width:60%"><span class="bar time"><i class="seen" '
        f'style="width:{100 * value / longest:.1f}%"></i></span></td><td>{duration(value)}</td></tr>'
        for name, value in steps.items()
    )
    whole = f"<tr><th>total</th><td></td><td><b>{duration(total_seconds(seconds))}</b></td></tr>"
    return f'<h2>Time</h2><div class="panel"><table><tbody>{rows}{whole}</tbody></table></div>'


def _method(stages: Mapping[str, StageResult]) -> str:
    """The meaning of the figures, and what they can be compared with."""
    points = [
        "Exchanged: every sample is shown the image of another one, none its own, by one seeded exchange.",
        "Intervals: 95 % bootstrap; all samples of one image are drawn together. The gain is paired by question.",
    ]
    stage = last_stage(stages)
    for task, name in (("vqa", "VQA accuracy"), ("caption", "CIDEr")):
        result = stage.result(task, shuffled=False)
        if result is not None:
            points.append(f"{name}: {_protocol(result)}")
    for bundle, source, difference in losses_of_bundles(stages):
        names = f"{escape(bundle.model.title)} minus {escape(source.model.short)}"
        points.append(f"{names}: {signed(difference)} points, paired by question.")
    items = "".join(f"<li>{point}</li>" for point in points)
    return f"<footer><h2>How this was measured</h2><ul>{items}</ul></footer>"


def _protocol(result: Mapping[str, Any]) -> str:
    facts = result["protocol_facts"]
    prompt = escape(facts["prompt"].replace("\n", "\\n"))
    text = (
        f"{facts['num_samples']:,} samples, prompt <code>{prompt}</code>, greedy, at most "
        f"{facts['decoding']['max_new_tokens']} tokens, normalisation <code>{escape(facts['normalisation'])}</code>, "
        f"protocol <code>{escape(result['protocol'])}</code>. Figures of other protocols do not compare."
    )
    if result.get("tokenizer") == "plain":
        text += f" Words were split without Java's PTB tokenizer ({escape(str(result['tokenizer_reason']))})."
    return text
