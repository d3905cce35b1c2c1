"""What learns: a tuning plan put onto a model, as groups of parameters with their own learning rates.

A weight that learns is in fp32, whatever the frozen ones are in; the engine computes in bf16 over it. So a trained
weight is its own master copy, and what a checkpoint holds is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from models.errors import InputError
from models.vlm import VLM
from trainer.config import Frozen, Full, Lora, TuningPlan

ADAPTER = "default"
"""The name that peft gives an adapter inside parameter names: `...q_proj.lora_A.default.weight`."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one part that share a peak learning rate and a weight decay."""

    part: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float
    weight_decay: float


def apply_plan(vlm: VLM, plan: TuningPlan, *, seed: int) -> list[ParameterGroup]:
    """Freeze, unfreeze or adapt each part in place; the groups that the optimizer gets, biases and norms apart.

    Adapters are drawn from `seed`: the same on every rank.
    """
    vlm.requires_grad_(False)
    groups: list[ParameterGroup] = []
    parts = (("vision", plan.vision), ("projector", plan.projector), ("language", plan.language))
    for part, tuning in (*parts, ("future", plan.future)):
        module = getattr(vlm, part)
        if isinstance(tuning, Frozen):
            continue
        if module is None:
            raise InputError(f"tune.{part}: the model has none; model.{part} says what it is")
        if isinstance(tuning, Lora):
            add_adapters(module, tuning, seed)
        else:
            _unfreeze(module, part, tuning)
            if part == "vision":
                _freeze_unreached(vlm)
        learning = [(f"{part}.{name}", value) for name, value in module.named_parameters() if value.requires_grad]
        for _, value in learning:
            value.data = value.data.to(torch.float32)
        groups += _groups(part, learning, tuning)
    return groups


def _unfreeze(module: nn.Module, part: str, tuning: Full) -> None:
    """Let the part's weights learn but for those in modules that stay frozen; every name given must be one of it."""
    names = [name for name, _ in module.named_parameters()]
    for chosen in (*tuning.frozen, *tuning.learning_rates):
        if not any(is_inside(f"{part}.{name}", part, chosen) for name in names):
            inner = ", ".join(sorted({name.partition(".")[0] for name in names}))
            raise InputError(f"tune.{part}: {chosen} names no module of it; its outermost ones are {inner}")
    for name, value in module.named_parameters():
        value.requires_grad_(not any(is_inside(f"{part}.{name}", part, kept) for kept in tuning.frozen))


def _freeze_unreached(vlm: VLM) -> None:
    """Freeze what the features do not depend on: layers after the feature layer, poolers, norms at the end."""
    vision, side = vlm.vision, vlm.image.size
    device = next(vision.parameters()).device
    vision(torch.zeros(1, 3, side, side, device=device)).sum().backward()
    for value in vision.parameters():
        value.requires_grad_(value.requires_grad and value.grad is not None)
        value.grad = None


def add_adapters(language: nn.Module, tuning: Lora, seed: int) -> None:
    """Put fresh LoRA adapters (B = 0) on the language model's linear layers; its own weights stay frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        use_dora=tuning.dora,
        target_modules="all-linear" if tuning.targets == "all_linear" else list(tuning.targets),
        exclude_modules=["lm_head"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language, adapter_name=ADAPTER)


def _groups(part: str, learning: list[tuple[str, nn.Parameter]], tuning: Full | Lora) -> list[ParameterGroup]:
    """For each learning rate: matrices with the part's weight decay, then vectors (norms, biases) without."""
    own_rates = tuning.learning_rates if isinstance(tuning, Full) else {}
    members: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, value in learning:
        rate = next((own for module, own in own_rates.items() if is_inside(name, part, module)), tuning.learning_rate)
        decay = tuning.weight_decay if value.ndim > 1 else 0.0
        members.setdefault((rate, decay), []).append((name, value))
    groups = []
    for (rate, decay), pairs in members.items():
        names, parameters = zip(*pairs, strict=True)
        groups.append(ParameterGroup(part, names, parameters, rate, decay))
    return groups


def is_inside(name: str, part: str, module: str) -> bool:
    """Whether a parameter lies in `module` of its part; the module may stand at any depth (`cross_attention`)."""
    return f".{module}." in f".{name.removeprefix(part + '.')}."
