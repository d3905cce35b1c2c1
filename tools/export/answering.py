"""Checks that a bundle answers as its user opens it: whole in memory, in its own dtype, with every loader that supports
it.

The other checks of a parity report read one layer at a time and compute in fp32: they miss a configuration whose dtype
differs from the files', and overflows in half precision. Memory: one copy of the weights at a time; without room for it
the report states that nothing was tried.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.predictor import Decoding, Predictor, Query, Turn
from models.bundle import Check, Manifest, Parity, add_checks, write_manifest
from models.common.errors import InputError
from models.common.memory import free_bytes
from models.opening import open_config, open_model, open_processor
from tools.export.backends import torchvision_check
from tools.export.golden import Probe
from tools.export.parity import device_of_this_machine, failed_checks, stock_inputs

NUM_TOKENS = 8
"""Tokens of the answer: a first step, and some that use the cache of earlier steps."""

SPARE_BYTES, SHARE_OF_WEIGHTS = 500_000_000, 1.2
"""Memory for opening in addition to the weights: activations, and tensors being loaded."""


@dataclass(frozen=True)
class Limits:
    """Whether to write a bundle that fails a check, and the memory for opening it (None: what is free)."""

    force: bool = False
    memory_gb: float | None = None


def finish(
    directory: Path,
    probes: Sequence[Probe],
    parity: Parity,
    refusal: str,
    limits: Limits,
    **facts: Any,
) -> Manifest:
    """Write the manifest, then open the bundle, query it on the first probe, and add the results to the report.

    `facts` are the manifest's other fields. Raises InputError, prefixed by `refusal`, where a check fails, unless
    forced.
    """
    _insist(parity, refusal, limits)
    manifest = write_manifest(directory, parity=parity, **facts)
    checks = (torchvision_check(directory, probes), *answer_checks(directory, probes[0], limits.memory_gb))
    manifest = add_checks(directory, manifest, checks)
    _insist(manifest.parity, refusal, limits)
    return manifest


def _insist(parity: Parity, refusal: str, limits: Limits) -> None:
    if not parity.passed and not limits.force:
        raise InputError(f"{refusal} ({failed_checks(parity)}); --force writes it all the same")


def answer_checks(directory: Path, probe: Probe, memory_gb: float | None = None) -> tuple[Check, ...]:
    """One check for each loader that supports the bundle; stock transformers only where all of its classes are stock.

    The value is 1 where an answer was generated, else 0 with the error in the note. Where the weights do not
    fit into what is free, or into `memory_gb`, the check has no bound and a note with the reason.
    """
    from models.registered import OWN_CONFIGS

    ways: dict[str, Callable[[Path, Probe, torch.device], None]] = {"a whole answer is written": _ask_ours}
    if not isinstance(open_config(directory), OWN_CONFIGS):
        ways["a whole answer is written by stock transformers"] = _ask_stock
    device = device_of_this_machine()
    found = []
    for name, ask in ways.items():
        lack = lack_of_memory(weight_bytes(directory), device, memory_gb)
        if lack:
            print(f"{name}: {lack}", flush=True)
            found.append(Check(name=name, value=0.0, bound=None, passed=True, note=lack))
            continue
        fault = _fault_of(ask, directory, probe, device)
        found.append(Check(name=name, value=float(not fault), bound=1.0, passed=not fault, note=fault))
    return tuple(found)


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def lack_of_memory(num_bytes: int, device: torch.device, memory_gb: float | None) -> str:
    """Why a model whose weights take `num_bytes` is not opened, or ""."""
    needed_gb = (SPARE_BYTES + SHARE_OF_WEIGHTS * num_bytes) / 1e9
    free_gb = free_bytes(device) / 1e9
    if memory_gb is not None and needed_gb > memory_gb:
        return f"not tried, opening takes {needed_gb:.1f} GB and --memory-gb allows {memory_gb:g}"
    return f"not tried, opening takes {needed_gb:.1f} GB and {free_gb:.1f} are free" if needed_gb > free_gb else ""


def _fault_of(
    ask: Callable[[Path, Probe, torch.device], None], directory: Path, probe: Probe, device: torch.device
) -> str:
    """The error on the way to an answer, or ""."""
    try:
        ask(directory, probe, device)
    except Exception as error:  # any error that a user would get belongs in the report
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return ""


def _ask_ours(directory: Path, probe: Probe, device: torch.device) -> None:
    """Answer with `sightline.load`; the golden answer's loss shows errors that greedy tokens would hide."""
    predictor = Predictor.open(directory, device=str(device), verify=False)
    query = Query((probe.image,), (Turn("user", probe.question),))
    predictor.answer([query], Decoding(max_new_tokens=NUM_TOKENS))
    ((loss_sum, _),) = predictor.loss([query], [probe.answer])
    if not math.isfinite(loss_sum):
        raise ArithmeticError(f"the golden answer's loss is {loss_sum}")


@torch.no_grad()
def _ask_stock(directory: Path, probe: Probe, device: torch.device) -> None:
    """Answer with stock transformers, as in docs/bundle.md."""
    processor, model = open_processor(directory), open_model(directory, device)
    inputs = {name: value.to(device) for name, value in stock_inputs(processor, probe).items()}
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS)
    processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
