"""The argument by which models of transformers take keys and values: `past_key_values`, which 5.24 calls `cache`.

Stock classes of 5.24 take both names and pass on the new one. A class of ours that knew the old one alone would read
each token without those before it, and nothing would say so.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

NAMES = ("cache", "past_key_values")


@lru_cache
def name() -> str:
    """What the installed transformers calls it, in calls and in outputs."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return next(each for each in NAMES if each in BaseModelOutputWithPast.__dataclass_fields__)


def cache_option(cache: Any) -> dict[str, Any]:
    """The cache as an argument of a stock class, or of its output."""
    return {name(): cache}


def take_cache(options: dict[str, Any]) -> Any:
    """Take the cache out of a call's options, by whichever name; None where there is none."""
    given = [options.pop(each, None) for each in NAMES]
    return next((cache for cache in given if cache is not None), None)
