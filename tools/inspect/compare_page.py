"""The samples on which two evaluations differ, as one HTML page: image, question, right answer, both answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.images import ImageError, open_image
from trainer.validation.html_report import image_tag, write_page

if TYPE_CHECKING:
    from tools.inspect.compare import Measured, Pair

MAX_SHOWN = 200
"""Samples of each pair, those that changed most first."""
_LONGEST_SIDE = 256
_TRUTHS = ("truth", "label", "human_answers", "references")
_SCORES = ("score", "accuracy", "CIDEr", "counts_as")

_STYLE = """
table.samples td { vertical-align: top; max-width: 20rem; overflow-wrap: anywhere; border-top: 1px solid #ddd; }
.rose { color: #176d2c; } .fell { color: #a11; }
"""


def write_differences(file: Path, pairs: Sequence[Pair]) -> None:
    """Write the page; a picture that is not there any more is named only."""
    write_page(file, "Differences", "".join(_section(pair) for pair in pairs), _STYLE)


def _section(pair: Pair) -> str:
    before, after = pair.before, pair.after
    changed = sorted(
        ((_score(other) - _score(before.samples[key]), key) for key, other in after.samples.items()),
        key=lambda each: -abs(each[0]),
    )
    changed = [(change, key) for change, key in changed if change]
    head = (
        f"<h2>{escape(before.name)}</h2><p>{escape(str(before.path))} and {escape(str(after.path))}: "
        f"{pair.comparison.metric} {pair.comparison.before:.4f} and {pair.comparison.after:.4f}; "
        f"{len(changed)} of {len(before.samples)} samples differ, {min(len(changed), MAX_SHOWN)} are shown</p>"
    )
    rows = "".join(_row(change, before, after, key) for change, key in changed[:MAX_SHOWN])
    return f'{head}<table class="samples"><tr><th>image<th>question<th>right<th>before<th>after</tr>{rows}</table>'


def _row(change: float, before: Measured, after: Measured, key: tuple[str, ...]) -> str:
    one, other = before.samples[key], after.samples[key]
    truth = next((one[name] for name in _TRUTHS if name in one), "")
    cells = [_picture(one), _text(one.get("question")), _text(truth), _text(one["answer"])]
    kind = "rose" if change > 0 else "fell"
    return f'<tr>{"".join(f"<td>{cell}</td>" for cell in cells)}<td class="{kind}">{_text(other["answer"])}</td></tr>'


def _text(value: Any) -> str:
    texts = dict.fromkeys(map(str, value)) if isinstance(value, list) else [str(value or "")]
    return escape("; ".join(texts))


def _picture(sample: Mapping[str, Any]) -> str:
    name = str(sample.get("shown") or sample.get("picture") or "")
    try:
        return image_tag(open_image(Path(name)), name, _LONGEST_SIDE)
    except (ImageError, OSError):
        return escape(name)


def _score(sample: Mapping[str, Any]) -> float:
    if "counts_as" in sample:
        return float(sample["counts_as"] == sample["label"])
    return float(next((sample[name] for name in _SCORES if name in sample), 0.0))
