"""Text that is no Unicode: JSON can write half of a surrogate pair (`"\\ud83d"`), which has no UTF-8 and no tokens.

Owns finding it, for every file of ours that holds a user's text.
"""

from __future__ import annotations

import re
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")


def half_character(value: Any) -> str | None:
    """The first half character in a text, or in any text of a JSON value, as `U+D83D`; None where there is none."""
    if isinstance(value, str):
        found = _HALF.search(value)
        return f"U+{ord(found[0]):04X}" if found else None
    if isinstance(value, dict):
        return next((half for each in value.items() if (half := half_character(list(each)))), None)
    if isinstance(value, list):
        return next((half for each in value if (half := half_character(each))), None)
    return None
