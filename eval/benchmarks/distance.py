"""Levenshtein's distance between two texts."""

from __future__ import annotations


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of one character that make `other` of `one`."""
    if one == other:
        return 0
    previous = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]
