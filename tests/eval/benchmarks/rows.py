"""Rows of tests, without files."""

from __future__ import annotations

from typing import Any

from eval.benchmarks.row import Row


def row(truth: Any = "A", options: str | dict[str, str] = "", **fields: Any) -> Row:
    """A row; a text of letters as options stands for options of that letter alone."""
    texts = options if isinstance(options, dict) else {letter: f"text {letter}" for letter in options}
    return Row(("0",), "?", truth, None, texts, fields)
