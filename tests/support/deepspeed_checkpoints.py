"""Real checkpoints of plain DeepSpeed: a tiny language model, trained one step in full or with peft's adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.context import DistributedContext

PROMPT = (5, 9, 2, 7, 30, 31, 3, 8)


@dataclass(frozen=True)
class Case:
    """One checkpoint: the ZeRO stage, the precision, and what learns."""

    stage: int
    precision: str
    tuning: str
    exclude_frozen: bool = False

    @property
    def name(self) -> str:
        return f"z{self.stage}_{self.precision}_{self.tuning}{'_excluded' if self.exclude_frozen else ''}"


def write_checkpoints(ranks: DistributedContext, base: str, root: str, cases: list[Case]) -> None:
    """Train every case one step on these ranks and save it under `root`; rank 0 notes the logits of `PROMPT`."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for case in cases:
        engine = _engine(base, case)
        ids = torch.tensor([PROMPT])
        engine.backward(engine(input_ids=ids + ranks.rank, labels=ids).loss)
        engine.step()
        folder = Path(root) / case.name
        engine.save_checkpoint(str(folder), tag="step_1", exclude_frozen_parameters=case.exclude_frozen)
        with torch.no_grad():
            logits = engine(input_ids=ids).logits.float()
        if ranks.is_first:
            (folder / "logits.json").write_text(json.dumps(logits.tolist()))
        engine.destroy()
    torch.distributed.destroy_process_group()


def _engine(base: str, case: Case) -> Any:
    import deepspeed
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if case.tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case.stage},
        "bf16": {"enabled": case.precision == "bf16"},
    }
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine
