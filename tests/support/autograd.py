"""What a forward keeps for its backward, counted by its storages."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch

from tools.dev.bench.count import as_on_a_gpu
from trainer.engine.train_step import TrainingTask


class Saved:
    """A tensor in the keeping of autograd's graph: it goes when its node does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_by_autograd(module: TrainingTask, batch: Any) -> int:
    """Bytes of every storage that a forward keeps for its backward, the parameters' own left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    alive = WeakSet[Saved]()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with as_on_a_gpu(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        sums = module(batch)
    assert sums.loss_sum.requires_grad
    storages = [saved.tensor.untyped_storage() for saved in alive]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in own}.values())
