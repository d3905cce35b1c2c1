"""The page of a run on photos: figures, training curves, and captions of photos drawn by seed, good and bad.

Owns its sections and their text. Frame, style, curves and cards are the report's (`tools.examples.report`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from html import escape
from typing import Any

from tools.examples.photos.figures import killed_line
from tools.examples.report.cards import draw, section
from tools.examples.report.page import Curve, curves_section, framed, seconds_section, total_seconds
from tools.examples.report.stages import StageResult, answered_samples
from tools.examples.report.text import duration, measured

TITLE = "Real photos"
NUM_SHOWN = 12


def page(
    results: Mapping[str, StageResult], curves: Mapping[str, Curve], facts: Mapping[str, Any], *, seed: int
) -> str:
    """The whole page; `results` are the scored models in the order of the run, the last trained one is `lora`."""
    captions = answered_samples(results, "caption")
    shown = draw(captions, NUM_SHOWN, random.Random(seed))
    note = (
        f"{len(shown)} of {len(captions):,} held-out photos, a random sample (seed {seed}), good and bad."
        f" LoRA gives {facts['num_different']} different captions for {facts['num_captions']} photos."
    )
    body = [
        f'<p class="mark">Sightline</p><h1>{TITLE}</h1>',
        _lead(results["lora"], facts),
        _tiles(results, facts),
        _table(results),
        section("What it says", note, shown, kind="captions photos"),
        curves_section(curves),
        f'<p class="note">{escape(killed_line(facts))}.</p>',
        seconds_section(facts["seconds"]),
        _method(results["lora"], facts),
    ]
    return framed(TITLE, body)


def _lead(lora: StageResult, facts: Mapping[str, Any]) -> str:
    """The finding in a sentence or two."""
    counts = facts["num_photos"]
    if lora.advice:
        return f'<p class="lead">{escape(lora.model.title)}: {escape(lora.advice)}</p>'
    gain = lora.metric("image_gain", "image_gain", shuffled=False)
    right, other = (lora.metric("caption", "CIDEr", shuffled=shuffled) for shuffled in (False, True))
    return (
        f'<p class="lead">Trained on {counts["train"]:,} photos with a caption each, the model finds the right words of'
        f" {counts['held_out']:,} held-out photos <b class=seen>{gain:.2f} nats a token</b> likelier than when it is"
        f" shown another photo. Its captions reach a CIDEr of <b class=seen>{right:.2f}</b>; with exchanged photos they"
        f" reach <b class=blind>{other:.2f}</b>.</p>"
    )


def _tiles(results: Mapping[str, StageResult], facts: Mapping[str, Any]) -> str:
    lora, nf4 = results["lora"], results["nf4"]
    cells = [
        (f"{lora.metric('image_gain', 'image_gain', shuffled=False):.2f} <small>nats</small>", "image gain after LoRA"),
        (f"{lora.metric('caption', 'CIDEr', shuffled=False):.2f}", "CIDEr after LoRA"),
        (f"{lora.metric('caption', 'CIDEr', shuffled=True):.2f}", "CIDEr with exchanged photos"),
        (f"{nf4.metric('caption', 'CIDEr', shuffled=False):.2f}", "CIDEr of the NF4 bundle"),
    ]
    if facts["seconds"]:
        cells.append((duration(total_seconds(facts["seconds"])), "for the whole chain"))
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{escape(what)}</span></div>' for value, what in cells)
    return f'<div class="tiles">{tiles}</div>'


def _table(results: Mapping[str, StageResult]) -> str:
    rows = ""
    for result in results.values():
        cells = [f"{result.metric('image_gain', name, shuffled=False):.3f}" for name in ("loss", "loss_shuffled")]
        cells.append(_spanned(measured(result, "image_gain", "image_gain", shuffled=False)))
        cells += [_spanned(measured(result, "caption", "CIDEr", shuffled=shuffled)) for shuffled in (False, True)]
        rows += f"<tr><th>{escape(result.model.title)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f"""<h2>Does it look at the photo?</h2><p class="note">A model that ignores the photo has an image gain of 0,
 and the same CIDEr with any photo.</p><div class="panel"><div class="wide"><table><thead><tr><th>model</th>
<th>loss</th><th>exchanged</th><th>image gain</th><th>CIDEr</th><th>exchanged</th></tr></thead><tbody>{rows}</tbody>
</table></div></div>"""


def _spanned(text: str) -> str:
    """A figure above its interval."""
    value, _, span = text.partition(" ")
    return f"{value}<small>{escape(span)}</small>" if span else value


def _method(lora: StageResult, facts: Mapping[str, Any]) -> str:
    """What was measured, with what, on what."""
    result = lora.result("caption", shuffled=False)
    prompt = "" if result is None else escape(result["protocol_facts"]["prompt"])
    versions = ", ".join(f"{name} {number}" for name, number in {**facts["packages"], **facts["versions"]}.items())
    points = [
        "Image gain: loss of the reference with another photo minus loss with the right one, in nats a token.",
        "Exchanged: every photo is replaced by another one, none its own, by one seeded exchange.",
        "Intervals: 95 % bootstrap over photos; one training run.",
        f"Captions: prompt <code>{prompt}</code>, greedy, one reference a photo where the list has one.",
        f"{escape(facts['precision'])} on {escape(facts['machine'])}, two ranks.",
        escape(versions) + ".",
    ]
    return f"<footer><h2>How this was measured</h2><ul>{''.join(f'<li>{each}</li>' for each in points)}</ul></footer>"
