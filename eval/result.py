"""The result of a measurement, and the protocol that makes two results comparable. Loads without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.bootstrap import Interval


@dataclass(frozen=True)
class TaskResult:
    """One measurement. Two results compare only where their `protocol` is the same.

    `facts` is what the protocol is made of; `details` are breakdowns and reasons; `samples` go to a JSONL file.
    """

    task: str
    name: str
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Interval]
    facts: Mapping[str, Any]
    shuffled: bool
    samples: Sequence[Mapping[str, Any]]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        """Hash over prompt, decoding, normalisation and the split's digests: what must be equal in a comparison.

        Exchanged images are not part of it, since results with and without them are compared.
        """
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """The result as a JSON object; the samples are only counted, they go to a file of their own."""
        return {
            "task": self.task,
            "name": self.name,
            "shuffled": self.shuffled,
            "num_samples": len(self.samples),
            "metrics": dict(self.metrics),
            "intervals": {name: interval.as_dict() for name, interval in self.intervals.items()},
            "protocol": self.protocol,
            "protocol_facts": dict(self.facts),
            **self.details,
        }
