"""What a comparison of gradients says: metrics that read back, and words where a cosine is low."""

from __future__ import annotations

from trainer.engine.numerics import Agreement
from trainer.tracking.numerics import Finding, as_metrics, describe, findings_of, from_metrics, warning

LOW, HIGH = Finding(0.41, 1.31), Finding(0.999, 1.0)


def test_metrics_read_back() -> None:
    found = {"projector": LOW, "language": HIGH}
    metrics = as_metrics(found, 2.5)
    assert metrics["numerics/cosine/projector"] == 0.41
    assert metrics["numerics/norm_ratio/language"] == 1.0
    assert metrics["numerics/seconds"] == 2.5
    assert from_metrics({"loss": 1.0, **metrics}) == found
    assert from_metrics({"loss": 1.0}) == {}


def test_a_part_that_no_gradient_reaches_says_nothing() -> None:
    agreements = {"vision": Agreement(), "projector": Agreement.of_row(6.0, 9.0, 4.0)}
    assert findings_of(agreements) == {"projector": Finding(1.0, 1.5)}
    assert describe(findings_of(agreements)) == "projector cosine 1.000, norm x 1.50"
    assert describe({}) == "no part has a gradient"


def test_a_low_cosine_warns_with_the_cause_and_what_to_try() -> None:
    assert warning({"projector": HIGH}, "bf16", image_is_first=True) == ""
    told = warning({"projector": LOW, "language": HIGH}, "bf16", image_is_first=True)
    assert told.startswith("projector: bf16 carries little of the first gradient")
    assert 'set data.template.opening to one, "\\n" for instance' in told
    assert "engine.precision: fp32" in told
    assert "opening" not in warning({"projector": LOW}, "fp16", image_is_first=False)
