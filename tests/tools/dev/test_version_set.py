"""The lowest set has each library at the lower bound of its range."""

from __future__ import annotations

from tools.dev.version_set import lowest


def test_each_library_is_at_its_lower_bound_and_what_is_kept_as_it_is() -> None:
    ranges = [("torch", "<2.14,>=2.11"), ("peft", ">=0.21,<0.22"), ("ninja", ""), ("numpy", ">=2.0")]
    assert list(lowest(ranges, ["torch==2.13.0"])) == ["torch==2.13.0", "peft==0.21", "numpy==2.0"]
    assert next(lowest(ranges, [])) == "torch==2.11"
