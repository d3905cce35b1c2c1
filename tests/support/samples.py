"""References and samples without a shard set behind them."""

from __future__ import annotations

from data_pipeline.sample import SampleRef


def ref(n: int = 0, key: str | None = None, *, slot: int = 0, shard: str = "s.tar") -> SampleRef:
    """The n-th draw of a slot, whose sample is called `key`, or else by its number."""
    return SampleRef(slot, n, 0, n, shard, str(n) if key is None else key)
