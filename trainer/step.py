"""The module that the engine wraps: model and objective as one, so that weights are touched only inside its forward."""

from __future__ import annotations

import torch
from torch import nn

from data_pipeline.batch import Batch
from models.vlm import VLM
from trainer.objectives import BatchLoss, LossSum


class TrainStep(nn.Module):
    """batch -> LossSum, in bf16 over fp32 weights where `precision` says so."""

    def __init__(self, vlm: VLM, objective: BatchLoss, precision: str) -> None:
        super().__init__()
        self.vlm = vlm
        self.objective = objective
        self.precision = precision

    def forward(self, batch: Batch) -> LossSum:
        """The sums of one micro-batch, on the batch's device."""
        with torch.autocast(batch.input_ids_BL.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.objective(self.vlm, batch)
