"""What a shard set holds and no sample uses: tars that the index does not list, members that nobody reads.

Owns the remarks that `index`, `check`, preflight and the start of a stage make. Does not own what is read (`record`).
"""

from __future__ import annotations

from data_pipeline.index import ShardIndex
from data_pipeline.record import is_read

_MAX_NAMED = 8


def unread_members(index: ShardIndex) -> dict[str, int]:
    """How many members of each extension no sample uses."""
    found: dict[str, int] = {}
    for (extension, is_image), count in index.count_members().items():
        if not is_read(extension, is_image=is_image):
            found[extension] = found.get(extension, 0) + count
    return found


def unlisted_shards(index: ShardIndex) -> list[str]:
    """The tars beside the index that it does not list; none for a set at an address."""
    if index.remote is not None:
        return []
    return sorted(path.name for path in index.folder.glob("*.tar") if not index.lists(path.name))


def remarks(index: ShardIndex) -> list[str]:
    """What is there and not used, one line each."""
    found = []
    if tars := unlisted_shards(index):
        named = ", ".join(tars[:3]) + (", …" if tars[3:] else "")
        found.append(
            f"{index.folder}: its index does not list {named} ({len(tars)} tars), so nothing is read from them; run"
            f" `python -m tools.shards index {index.folder}`"
        )
    if members := unread_members(index):
        named = ", ".join(f"{count} .{extension}" for extension, count in sorted(members.items())[:_MAX_NAMED])
        found.append(
            f"{index.folder}: members that no sample uses: {named}; images are KEY.jpg, or KEY.0.jpg, KEY.1.jpg"
        )
    return found
