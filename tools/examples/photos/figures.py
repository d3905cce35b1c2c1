"""The figures of a run on photos, read from what its steps left.

    RUN/eval/NAME.json, RUN/seconds.json, RUN/lora/{killed,audit}.json, RUN/split --> values, and the words for them

Owns no file and no layout.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.examples.photos.packages import PACKAGES
from tools.examples.photos.steps import SCORED
from tools.examples.report.stages import QUANTIZED, ScoredModel, StageResult

LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "gguf", "onnx")


def read_results(run: Path) -> dict[str, StageResult]:
    """The evaluations of the scored models, by name; raises InputError where one is missing."""
    found = {}
    for name in SCORED:
        model = ScoredModel(name, "bundle" if name in QUANTIZED else "stage")
        found[name] = StageResult.read(model, run / "eval" / f"{name}.json")
    return found


def read_facts(run: Path, results: Mapping[str, StageResult]) -> dict[str, Any]:
    """Seconds, versions, machine, counts, and what happened when the run was killed."""
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    seconds, killed = run / "seconds.json", run / "lora" / "killed.json"
    audit = json.loads((run / "lora" / "audit.json").read_text(encoding="utf-8"))
    lists = {name: json.loads((run / "split" / f"{name}.json").read_text()) for name in ("train", "held_out")}
    return {
        "seconds": json.loads(seconds.read_text(encoding="utf-8")) if seconds.is_file() else {},
        "killed": json.loads(killed.read_text(encoding="utf-8")) if killed.is_file() else None,
        "audit": audit,
        "precision": recipe["stages"]["lora"]["engine"]["precision"],
        "seed": recipe["seed"],
        "num_photos": {name: len({entry["file_name"] for entry in entries}) for name, entries in lists.items()},
        "num_captions": len(results["lora"].samples("caption")),
        "num_different": len({sample["answer"] for sample in results["lora"].samples("caption")}),
        "machine": machine(),
        "versions": {name: version(name) for name in LIBRARIES},
        "packages": {package.name: package.version for package in PACKAGES},
    }


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{len(os.sched_getaffinity(0))} cores, {name}"


def summary(result: StageResult) -> dict[str, Any]:
    """One model's entry in report.json."""
    return {
        "image_gain": _value(result, "image_gain", "image_gain"),
        "loss": result.metric("image_gain", "loss", shuffled=False),
        "loss_shuffled": result.metric("image_gain", "loss_shuffled", shuffled=False),
        "cider": _value(result, "caption", "CIDEr"),
        "cider_shuffled": _value(result, "caption", "CIDEr", shuffled=True),
    }


def _value(result: StageResult, task: str, name: str, *, shuffled: bool = False) -> dict[str, float | None]:
    interval = result.interval(task, name, shuffled=shuffled) or {}
    value = result.metric(task, name, shuffled=shuffled)
    return {"value": value, "low": interval.get("low"), "high": interval.get("high")}


def killed_line(facts: Mapping[str, Any]) -> str:
    """What the kill cost, and the audit's word on it."""
    killed, audit = facts["killed"], facts["audit"]
    if killed is None:
        return "LoRA was not killed: it ended before a checkpoint and a step behind it"
    clean = "no sample lost, none twice" if audit["clean"] else "the audit is NOT clean"
    return f"LoRA was killed after step {killed['step']} and went on from step {killed['checkpoint']}: {clean}"
