"""The module that the engine wraps: model and objective in one forward, and the engine's settings applied to a model.

Weights are used only inside this forward, as ZeRO-3 requires: DeepSpeed gathers and releases parameters in
hooks around it.
"""

from __future__ import annotations

import torch
from torch import nn

from data_pipeline.batch import Batch
from models.dropout import use_fast_dropout
from models.vlm import VLM
from trainer.config.schema import EngineConfig
from trainer.objectives.loss_sum import BatchLoss, LossSum

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By precision: the dtype of computations under autocast, and of frozen weights in memory."""


def configure_model(vlm: VLM, engine: EngineConfig) -> None:
    """Apply activation checkpointing, compilation and precision to a model, in place.

    Call it after `apply_plan`, whose adapters it configures, and before `build_engine`.
    """
    layers = engine.activation_checkpointing
    vlm.decoder.recompute(vlm.decoder.num_layers if layers is True else int(layers))
    if engine.compile:
        vlm.decoder.compile()
    if engine.precision != "fp32":
        is_on_cpu = next(vlm.parameters()).device.type == "cpu"
        for module in vlm.modules():
            # peft casts an adapter's input to the adapter's dtype, fp32 (LoraLayer.cast_input_dtype_enabled); autocast
            # casts it back: a copy to write and one to keep for the backward.
            if hasattr(module, "cast_input_dtype_enabled"):
                setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010 - mypy takes it for a tensor
                if is_on_cpu:
                    use_fast_dropout(module)


class TrainingTask(nn.Module):
    """batch -> LossSum, computed in `precision` over trained weights that are fp32, or bf16 with fp32 masters."""

    def __init__(self, vlm: VLM, objective: BatchLoss, precision: str) -> None:
        super().__init__()
        self.vlm = vlm
        self.objective = objective
        self.precision = precision
        self.dtype = DTYPES[precision]

    def forward(self, batch: Batch) -> LossSum:
        """The sums over one micro-batch, on its device. Under ZeRO-3 every rank must call it equally often."""
        with torch.autocast(batch.device.type, self.dtype, enabled=self.precision != "fp32"):
            return self.objective(self.vlm, batch)
