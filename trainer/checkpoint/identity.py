"""Whether weights on disk are those that a recipe describes: the one comparison that every reader of them makes.

    a start that goes on, `init` from another stage, a finished stage started again, a merge, a replay
        --> record of the checkpoint | record of the present recipe --> compare --> check

Content decides, not paths: a base, a tokenizer and a shard set are known by their digests wherever both records have
them, so that a copy elsewhere is the same. A value that a record lacks (an older version did not write it, or its file
is not on this machine) is not compared. What may change is the table below; docs/training.md explains it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.common.errors import InputError
from models.common.source import digest_of, digest_of_files, directory_of
from models.spec import ImageSpec, TextSpec
from trainer.checkpoint.initial_weights import base_digests
from trainer.config.older import with_absent
from trainer.config.recipe import Recipe

Rule = Literal["must match", "may grow", "converted", "free"]

RULES: Mapping[str, Rule] = {
    # How a run is computed: a checkpoint is converted to it.
    "world_size": "converted",
    "engine": "converted",
    "batch.micro_rows": "converted",
    "data.num_workers": "converted",
    "model.vision.keep_features": "free",
    "model.keep_features": "free",
    # What a run says and keeps, when it gives up, and where copies of its data lie.
    "checkpoint": "free",
    "guard": "free",
    "validation": "free",
    "data.bad_share_limit": "free",
    "data.sources.*.cache": "free",
    "data.sources.*.cache_gb": "free",
    # A stage may be trained for longer than it was planned.
    "duration.count": "may grow",
}
"""Dotted names in a record, `config.` left out; a rule holds for what lies below it. Everything else must match."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Field:
    """One value of a stage's record, as the checkpoint has it and as the present recipe has it."""

    name: str
    before: Any
    now: Any
    rule: Rule

    @property
    def differs(self) -> bool:
        """Whether the two values are not the same."""
        return bool(self.before != self.now)

    @property
    def is_place(self) -> bool:
        """Whether this is where a file lies, which does not say what it holds."""
        return self.name.rpartition(".")[2] in {"path", "weights", "tokenizer", "architecture", "adapter"}

    @property
    def is_longer(self) -> bool:
        """Whether this is a plan to train for longer."""
        return self.rule == "may grow" and self.differs and bool(self.now > self.before)

    def is_refused(self, *, may_grow: bool) -> bool:
        """Whether the weights cannot be taken for those that the recipe describes."""
        if self.rule == "may grow":
            return self.differs and not (may_grow and self.is_longer)
        return self.rule == "must match" and self.differs

    def line(self) -> str:
        """The field as one line of the table that a resumed run prints."""
        if not self.differs:
            return f"  {self.name:<24} {self.rule:<11} same"
        verdict = {"converted": "converted", "free": "changed"}.get(self.rule, "DIFFERS")
        verdict = "longer" if self.is_longer else verdict
        return f"  {self.name:<24} {self.rule:<11} {verdict}: {_short(self.before)} -> {_short(self.now)}"


def record_of(
    recipe: Recipe,
    stage: str,
    *,
    digests: Mapping[str, Mapping[str, str]] | None = None,
    fingerprint: str | None = None,
    image: ImageSpec | None = None,
    text: TextSpec | None = None,
    start: Mapping[str, str] | None = None,
    world_size: int | None = None,
) -> dict[str, Any]:
    """What identifies a stage of a recipe, as JSON; a checkpoint carries it. What is None is not recorded.

    Args:
        digests: `digests_of` the recipe.
        fingerprint: of the stage's order of samples, which follows from the samples' content.
        image: what the model's images are, from the files beside the weights; `text` likewise.
        start: `start_of` the checkpoint that the stage starts from.
        world_size: ranks that train.
    """
    values = {
        "stage": stage,
        "seed": recipe.seed,
        "model": recipe.model.model_dump(mode="json"),
        "config": recipe.stage(stage).model_dump(mode="json"),
        **(digests or {}),
        "fingerprint": fingerprint,
        "image": None if image is None else image.model_dump(mode="json"),
        "text": None if text is None else text.model_dump(mode="json"),
        "start": None if start is None else dict(start),
        "world_size": world_size,
    }
    return {name: value for name, value in values.items() if value is not None}


def start_of(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, str]:
    """What a stage that starts from a checkpoint records of it; one of an older version has no id."""
    named = {"stage": checkpoint.parents[1].name, "checkpoint": checkpoint.name}
    return {**named, "id": str(state["id"])} if "id" in state else named


def digests_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    """The sha256 of the files that a stage relies on beside its checkpoint.

    `base` has the pretrained weights by part. `files` has what the `projector` starts from, the files of the
    `tokenizer`, and the `architecture` where a file describes the encoder.
    """
    model = recipe.model
    encoder, architecture = model.projector.text_encoder, Path(getattr(model.vision, "architecture", ""))
    weights = getattr(model.projector, "weights", None)
    projector = None if weights is None else digest_of_files(Path(weights).parent, (Path(weights).name,))
    found = {
        "projector": digest_of(directory_of(encoder.path)) if encoder is not None else projector,
        "tokenizer": digest_of_files(directory_of(model.language.tokenizer_path), _TOKENIZER_FILES),
        "architecture": digest_of_files(architecture.parent, (architecture.name,)) if architecture.is_file() else None,
    }
    files = {name: digest for name, digest in found.items() if digest is not None}
    files |= dict(_adapter_digests(recipe))
    return {"base": base_digests(recipe), "files": files}


def _adapter_digests(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Of the peft adapters that stages start from."""
    for name, stage in recipe.stages.items():
        for part in ("vision", "projector", "language"):
            adapter = getattr(getattr(stage.tune, part), "adapter", None)
            if adapter is not None:
                yield f"adapter of {name}, {part}", digest_of_files(Path(adapter), _ADAPTER_FILES)


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Field]:
    """The fields of a checkpoint's record beside those of the present recipe, each with its rule.

    What is the same stands as one field for each part of the recipe; what differs stands value by value.

    Args:
        before: a checkpoint's state.json.
        now: `record_of` the present recipe.
    """
    before = {"fingerprint": before.get("stream", {}).get("fingerprint"), **before}
    by_content = _known_by_content(before, now)
    names = ("seed", "model", "base", "files", "image", "text", "start", "fingerprint", "world_size")
    parts = [(name, before[name], now[name]) for name in names if before.get(name) is not None and name in now]
    config = with_absent(before.get("config", {}))
    parts += [(name, config[name], value) for name, value in now["config"].items() if name in config]
    fields: list[Field] = []
    for name, old, new in parts:
        found = [each for each in _differences(name, old, new) if each.name not in by_content]
        fields += found or [Field(name, old, old, _rule(name))]
    return fields


def check(table: list[Field], checkpoint: Path, recipe_file: Path, *, may_grow: bool = True, advice: str = "") -> None:
    """Raise InputError, with every value that differs, where weights are not those that a recipe describes.

    Args:
        table: from `compare`.
        checkpoint: where the weights lie.
        recipe_file: says what they were made with.
        may_grow: whether a longer duration is a plan; not where the stage counts as finished with these weights.
        advice: what to do where it is not to take the values of `recipe_file`.
    """
    refused = [field for field in table if field.is_refused(may_grow=may_grow)]
    if not refused:
        return
    listed = ", ".join(f"{field.name} ({_short(field.before)} -> {_short(field.now)})" for field in refused)
    advice = advice or f"take those of {recipe_file}, or start anew with run=ANOTHER_DIRECTORY"
    raise InputError(f"{checkpoint}: made with another {listed}; {advice}")


def _differences(name: str, before: Any, now: Any) -> Iterator[Field]:
    """The values in which two parts of a record differ, by their dotted names.

    A key that the older record lacks is one that its version did not have. Of digests, either may lack one.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key, old in before.items():
            if key in now:
                yield from _differences(f"{name}.{key}", old, now[key])
            elif name not in {"base", "files"}:
                yield Field(f"{name}.{key}", old, None, _rule(f"{name}.{key}"))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{name}.{place}", old, new)
    elif before != now:
        yield Field(name, before, now, _rule(name))


def _rule(name: str) -> Rule:
    keys = ["*" if key.isdigit() else key for key in name.split(".")]
    for depth in range(len(keys), 0, -1):
        rule = RULES.get(".".join(keys[:depth]))
        if rule is not None:
            return rule
    return "must match"


def _known_by_content(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Names of paths, each of whose content both records have."""
    digests = {key for name in ("base", "files") for key in before.get(name, {}).keys() & now.get(name, {}).keys()}
    names = {f"model.{part}.{key}" for part in digests for key in ("path", "weights")}
    if "tokenizer" in digests:
        names.add("model.language.tokenizer")
    if {"vision", "language", "tokenizer"} <= digests:
        names.add("model.path")
    if "architecture" in digests:
        names.add("model.vision.architecture")
    if before.get("fingerprint") is not None and "fingerprint" in now:
        num_sources = len(now["config"]["data"]["sources"])
        names |= {f"data.sources.{place}.path" for place in range(num_sources)}
    return names


def _short(value: Any) -> str:
    text = str(value)
    if isinstance(value, str) and len(text) in {32, 64} and not text.strip("0123456789abcdef"):
        return f"{text[:12]}..."  # a digest
    return text if len(text) <= 60 else f"{text[:57]}..."
