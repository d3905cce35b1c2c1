"""Tensor by tensor in and out of safetensors: memory is bounded by one output file, not by the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import InputError


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model directory, one at a time, in the files' order."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(f"{directory}: no .safetensors in it; convert the weights (pickles are never opened)")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                yield name, opened.get_tensor(name)


class ShardedWriter:
    """Collects tensors into files of at most `max_bytes` and writes the index that transformers expects."""

    def __init__(self, directory: Path, max_bytes: int = 2_000_000_000) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._num_pending_bytes = 0
        self._shards: list[list[str]] = []
        self._num_bytes = 0

    def add(self, name: str, value: Tensor) -> None:
        """Take one tensor; a full file is written before the next one is begun."""
        num_bytes = value.numel() * value.element_size()
        if self._pending and self._num_pending_bytes + num_bytes > self._max_bytes:
            self._flush()
        self._pending[name] = value.contiguous()
        self._num_pending_bytes += num_bytes
        self._num_bytes += num_bytes

    def _flush(self) -> None:
        save_file(self._pending, self._directory / f"part-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._num_pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left and give the files their final names."""
        self._flush()
        total = len(self._shards)
        if total == 1:
            (self._directory / "part-0").rename(self._directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            (self._directory / f"part-{number}").rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
