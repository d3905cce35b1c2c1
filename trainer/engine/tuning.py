"""A tuning plan applied to a model: the trained parameters, as groups with their own learning rates.

A trained weight is fp32, whatever dtype the frozen ones have; the engine computes in its own precision over it. So a
trained weight is its own master copy, and what a checkpoint holds is exact. Where a language model is tuned in full in
bf16, `trainer.engine.masters` makes the parameters bf16 afterwards, with fp32 masters apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from models.common.errors import InputError
from models.placement import cast, gathered, share_of
from models.vlm import VLM
from trainer.config.tuning import Frozen, Full, Lora, TuningPlan
from trainer.engine.adapter_start import load_adapter, parts_in

ADAPTER = "default"
"""The name that peft gives an adapter inside parameter names: `...q_proj.lora_A.default.weight`."""


UNADAPTED = "lm_head"
"""The output head, which gets no adapter."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one part that share a peak learning rate and a weight decay."""

    part: str
    """The key of the recipe's `tune`: vision, projector, language or future."""
    names: tuple[str, ...]
    """In the whole model, in the order of `parameters`."""
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float
    """The peak; a step's is this times the schedule's factor."""
    weight_decay: float


def apply_plan(vlm: VLM, plan: TuningPlan, *, seed: int) -> list[ParameterGroup]:
    """Freeze, unfreeze or adapt each part of a model, in place.

    Args:
        seed: adapters are initialized from it, so they are the same on every rank.

    Returns:
        The optimizer's groups; a part's matrices and its vectors (biases, norms) are separate groups.

    Raises:
        InputError: the plan names a part or a module that the model does not have.
    """
    vlm.requires_grad_(False)
    _check_adapters(plan)
    groups: list[ParameterGroup] = []
    parts = (("vision", plan.vision), ("projector", plan.projector), ("language", plan.language))
    for part, tuning in (*parts, ("future", plan.future)):
        module = getattr(vlm, part)
        if isinstance(tuning, Frozen):
            continue
        if module is None:
            raise InputError(f"tune.{part}: the model has none; model.{part} says what it is")
        check_names(module, part, tuning)
        if isinstance(tuning, Lora):
            add_adapters(module, tuning, seed)
            if tuning.adapter is not None:
                load_adapter(module, part, tuning, prefix="model." if part == "vision" else "")
        else:
            _unfreeze(module, part, tuning)
        if part == "vision":
            _freeze_unreached(vlm)
        learning = [(f"{part}.{name}", value) for name, value in module.named_parameters() if value.requires_grad]
        for _, value in learning:
            cast(value, torch.float32)
        groups += _groups(part, learning, tuning)
    return groups


def _check_adapters(plan: TuningPlan) -> None:
    """Raise InputError where an adapter has parts that the plan does not start from it, which would be lost."""
    parts = {part: getattr(plan, part) for part in ("vision", "projector", "language")}
    named = {part: each.adapter for part, each in parts.items() if isinstance(each, Lora) and each.adapter is not None}
    for adapter in set(named.values()):
        lost = sorted(part for part in parts_in(adapter) if named.get(part) != adapter)
        if lost:
            raise InputError(f"{adapter}: it adapts {lost[0]} too; set tune.{lost[0]}: kind lora with the same adapter")


def check_names(module: nn.Module, part: str, tuning: Frozen | Full | Lora) -> None:
    """Look for every module that a plan names, in a part as it is before tuning; its weights are not needed.

    Raises:
        InputError: some are not there, or cannot be adapted; the nearest names that are right stand beside them.
    """
    if isinstance(tuning, Lora):
        _check_targets(module, part, tuning)
    elif isinstance(tuning, Full):
        names = [name for name, _ in module.named_parameters()]
        chosen = (*tuning.frozen, *tuning.learning_rates)
        wrong = [each for each in chosen if not any(is_inside(f"{part}.{name}", part, each) for name in names)]
        if wrong:
            inner = ", ".join(sorted({name.partition(".")[0] for name in names}))
            near = _nearest(wrong, {key for name, _ in module.named_modules() for key in name.split(".")})
            listed = ", ".join(wrong)
            raise InputError(f"tune.{part}: {listed} names no module of it{near}; its outermost ones are {inner}")


def adapted_modules(module: nn.Module, tuning: Lora) -> dict[str, nn.Module]:
    """The modules that get an adapter, by their dotted names: peft takes a target for the end of a name."""
    adaptable = _adaptable(module)
    if tuning.targets == "all_linear":
        return {name: each for name, each in adaptable.items() if not isinstance(each, nn.Embedding)}
    return {name: each for name, each in adaptable.items() if any(_is_target(name, end) for end in tuning.targets)}


def _check_targets(module: nn.Module, part: str, tuning: Lora) -> None:
    if tuning.targets == "all_linear":
        return
    adaptable = _adaptable(module)
    wrong = [end for end in tuning.targets if not any(_is_target(name, end) for name in adaptable)]
    if wrong:
        ends = sorted({name.rpartition(".")[2] for name in adaptable})
        raise InputError(
            f"tune.{part}.targets: {', '.join(wrong)} names no layer that can be adapted{_nearest(wrong, ends)};"
            f" there are {', '.join(ends)}"
        )
    if any(isinstance(each, nn.Embedding) for each in adapted_modules(module, tuning).values()):
        if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            raise InputError(
                f"tune.{part}.targets: the embedding is the output head as well (tie_word_embeddings), which a merge"
                " would change; leave it out"
            )
        if tuning.dora:
            raise InputError(f"tune.{part}.dora: an embedding takes LoRA alone; leave it out of targets")


def _adaptable(module: nn.Module) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, Conv1D)
    return {
        name: each
        for name, each in module.named_modules()
        if isinstance(each, kinds) and not _is_target(name, UNADAPTED)
    }


def _is_target(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _nearest(wrong: Sequence[str], right: Iterable[str]) -> str:
    known = sorted(right)
    found = [near for each in wrong for near in get_close_matches(each.rpartition(".")[2], known, n=1)]
    return f"; did you mean {', '.join(found)}?" if found else ""


def _unfreeze(module: nn.Module, part: str, tuning: Full) -> None:
    """Let a part's weights learn, except those in the modules that the plan keeps frozen."""
    for name, value in module.named_parameters():
        value.requires_grad_(not any(is_inside(f"{part}.{name}", part, kept) for kept in tuning.frozen))


def _freeze_unreached(vlm: VLM) -> None:
    """Freeze what the image features do not depend on: layers after the feature layer, poolers, final norms.

    No gradient would reach them, which the check for unused parameters would report as a mistake in the recipe. One
    backward over a black image finds them; for it a divided encoder is whole on every rank.
    """
    with gathered(vlm.vision.parameters()):
        vlm.vision.probe(vlm.image).backward()
        for value in vlm.vision.parameters():
            value.requires_grad_(value.requires_grad and value.grad is not None)
            value.grad = None


def add_adapters(part: nn.Module, tuning: Lora, seed: int) -> None:
    """Add new LoRA adapters (B = 0) to a part's linear layers; its own weights stay frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        use_dora=tuning.dora,
        # By whole names: "all-linear" is known for whole language models alone, and an end may be a convolution's too.
        target_modules="|".join(map(re.escape, adapted_modules(part, tuning))),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, part, adapter_name=ADAPTER)
    if tuning.dora:
        _set_magnitudes(part)


def _set_magnitudes(part: nn.Module) -> None:
    """Compute DoRA's magnitudes of divided matrices, of which peft saw no values, each from the whole matrix."""
    for _, layer in _with_magnitudes(part):
        bases = list(layer.get_base_layer().parameters())
        if any(share_of(each) is not None for each in bases):
            with gathered(bases):
                layer.lora_variant[ADAPTER].init(layer, adapter_name=ADAPTER)


def renew_magnitudes(vlm: VLM, loaded: Collection[str]) -> None:
    """Let DoRA begin at the weights that were loaded below it; else it would bring back the lengths of those before.

    Args:
        loaded: names of parameters that now have other values than the adapters saw. A magnitude among them stays.
    """
    for name, layer in _with_magnitudes(vlm):
        is_own = f"{name}.lora_magnitude_vector.{ADAPTER}.weight" in loaded
        if is_own or f"{name}.base_layer.weight" not in loaded:
            continue
        held = layer.lora_magnitude_vector[ADAPTER]
        with gathered(list(layer.get_base_layer().parameters())):
            layer.lora_variant[ADAPTER].init(layer, adapter_name=ADAPTER)  # peft puts a new parameter there
        held.weight.data.copy_(layer.lora_magnitude_vector[ADAPTER].weight.data)
        layer.lora_magnitude_vector[ADAPTER] = held  # the one that a group of what learns has


def _with_magnitudes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The (name, layer) of every layer that DoRA adapts."""
    for name, layer in module.named_modules():
        if ADAPTER in getattr(layer, "lora_magnitude_vector", ()):
            yield name, layer


def _groups(part: str, learning: list[tuple[str, nn.Parameter]], tuning: Full | Lora) -> list[ParameterGroup]:
    """One group for each learning rate and weight decay; vectors (norms, biases) have no weight decay."""
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
    """Whether a parameter, named in the whole model, lies in a module of its part.

    Args:
        module: a dotted run of the parameter's path, at any depth: `cross_attention` is that of every layer.
    """
    return f".{module}." in f".{name.removeprefix(part + '.')}."
