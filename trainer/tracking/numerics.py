"""What a comparison of gradients says: as metrics, as a line, and as a warning with what to try.

Owns the names of the metrics, the threshold and the words. Does not own the comparison (`trainer.engine.numerics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.engine.numerics import Agreement
    from trainer.tracking.loggers import Metrics

LEAST_COSINE = 0.95
"""Below it a gradient points elsewhere by more than 18 degrees."""

COSINE, NORM_RATIO, SECONDS = "numerics/cosine/", "numerics/norm_ratio/", "numerics/seconds"


@dataclass(frozen=True)
class Finding:
    """How one part's gradient in a stage's precision agrees with that in fp32."""

    cosine: float
    """The mean over some rows."""
    norm_ratio: float
    """The norm over that in fp32, of all these rows."""


def findings_of(agreements: Mapping[str, Agreement]) -> dict[str, Finding]:
    """By part; a part that no gradient reaches says nothing."""
    return {part: Finding(each.cosine, each.norm_ratio) for part, each in agreements.items() if each.num_rows}


def as_metrics(findings: Mapping[str, Finding], seconds: float) -> Metrics:
    """The names and values in metrics.jsonl."""
    values = {SECONDS: seconds}
    for part, found in findings.items():
        values |= {f"{COSINE}{part}": found.cosine, f"{NORM_RATIO}{part}": found.norm_ratio}
    return values


def from_metrics(metrics: Mapping[str, float]) -> dict[str, Finding]:
    """The findings in a line of metrics.jsonl; none where it has none."""
    parts = [name.removeprefix(COSINE) for name in metrics if name.startswith(COSINE)]
    return {part: Finding(metrics[f"{COSINE}{part}"], metrics[f"{NORM_RATIO}{part}"]) for part in parts}


def describe(findings: Mapping[str, Finding]) -> str:
    """`projector cosine 0.412, norm x 1.31; language …`."""
    found = [f"{part} cosine {each.cosine:.3f}, norm x {each.norm_ratio:.2f}" for part, each in findings.items()]
    return "; ".join(found) or "no part has a gradient"


def warning(findings: Mapping[str, Finding], precision: str, *, image_is_first: bool | None) -> str:
    """The likely causes and what to try, where a cosine is below `LEAST_COSINE`; else empty.

    Args:
        image_is_first: whether a sample that a language model reads begins with its image; None: not known.
    """
    low = [part for part, each in findings.items() if each.cosine < LEAST_COSINE]
    if not low:
        return ""
    front = (
        "the image stands at the very front, where a language model expects a token that it knows: set"
        ' data.template.opening to one, "\\n" for instance'
    )
    causes = {
        True: f"the likely cause: {front}; else",
        None: f"where {front}; else",
        False: "the likely causes: activations or single gradients too large for it beside all others; try",
    }
    return (
        f"{' and '.join(low)}: {precision} carries little of the first gradient (mean cosine with fp32's below"
        f" {LEAST_COSINE}), and the loss does not show it; {causes[image_is_first]} engine.precision: fp32 for this"
        " stage, or a lower learning_rate and a longer warmup; `sightline preflight --numerics` measures again"
    )
