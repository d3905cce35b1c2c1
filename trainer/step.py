"""The module that the engine wraps: model and objective as one, so that weights are touched only inside its forward."""

from __future__ import annotations

import torch
from torch import nn

from data_pipeline.batch import Batch
from models.vlm import VLM
from trainer.config import EngineConfig
from trainer.objectives import BatchLoss, LossSum


def set_up(vlm: VLM, engine: EngineConfig) -> None:
    """Put the engine's choices that concern the model onto it; after the tuning plan, before the engine is made."""
    layers = engine.activation_checkpointing
    vlm.decoder.recompute(vlm.decoder.num_layers if layers is True else int(layers))
    if engine.compile:
        vlm.decoder.compile()
    if engine.precision != "fp32":
        for module in vlm.modules():
            # peft would cast an adapter's input to fp32, which autocast casts back: a copy to write and one to keep.
            if hasattr(module, "cast_input_dtype_enabled"):
                setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010 - mypy takes it for a tensor


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What a precision computes in, and how frozen weights lie in memory."""


class TrainStep(nn.Module):
    """batch -> LossSum, computed in `precision` over fp32 weights."""

    def __init__(self, vlm: VLM, objective: BatchLoss, precision: str) -> None:
        super().__init__()
        self.vlm = vlm
        self.objective = objective
        self.precision = precision
        self.dtype = DTYPES[precision]

    def forward(self, batch: Batch) -> LossSum:
        """The sums of one micro-batch, on the batch's device. Under ZeRO-3 every rank must call this equally often."""
        with torch.autocast(batch.input_ids_BL.device.type, self.dtype, enabled=self.precision != "fp32"):
            return self.objective(self.vlm, batch)
