"""The states of the ranks' row streams as one, and whether a stream can resume from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from data_pipeline.sample_order import OrderIdentity
from models.common.errors import InputError

STATE_VERSION = 2


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one.

    Raises:
        InputError: they belong to different streams.
    """
    merged: dict[str, Any] = {}
    for state in states:
        if not merged:
            merged = {**state, "slots": dict(state["slots"])}
            continue
        check_state(state, OrderIdentity.of_state(merged))
        merged["slots"] |= state["slots"]
    return merged


def check_state(state: Mapping[str, Any], identity: OrderIdentity) -> None:
    """Raise InputError, with the reason, where a stream of this order cannot resume from a state."""
    if state.get("version") != STATE_VERSION:
        raise InputError(f"a stream state of version {state.get('version')}; this program reads {STATE_VERSION}")
    identity.check(state)
