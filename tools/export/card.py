"""A model card, README.md, in the form of the Hugging Face hub: front matter, then recipe, data, figures and parity.

What is known is stated; what only the author can know (licences, intended use) is a field to be filled in, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.documents import read_value
from models.common.errors import InputError
from models.common.files import write_text
from tools.export.public import without_paths

if TYPE_CHECKING:
    from models.bundle import Parity
    from tools.export.formats import ExportOptions

LIBRARIES = {"adapter": "peft", "gguf": "gguf"}
"""The hub's `library_name` of a format; transformers for all others."""

_STOCK = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(".", backend="pil")  # transformers 5; 4.57 takes no backend
model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto")
```

or `vllm serve .`
"""

OPENING = {
    "adapter": """\
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, ".")  # base: a model of transformers with the weights named above
```

or `vllm serve BASE --enable-lora --lora-modules NAME=.` (a base written by `--base`, and no DoRA)
""",
    "stock": _STOCK,
    "w4a16": _STOCK.replace("4.57 takes no backend", "and the package compressed-tensors"),
    "w8a16": _STOCK.replace("4.57 takes no backend", "and the package compressed-tensors"),
    "gguf": """\
```bash
llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf --image IMAGE -p QUESTION
```
""",
}


def write_card(
    directory: Path,
    format_name: str,
    recipe: Mapping[str, Any],
    parity: Parity,
    options: ExportOptions,
    *,
    family: str,
) -> None:
    """Write README.md.

    Args:
        family: `model_type` of the whole model, which the hub is searched by.

    Raises:
        InputError: the file of figures is not what `eval.run` writes.
    """
    recipe = without_paths(recipe)
    stage = recipe.get("stages", {}).get(recipe.get("stage"), {})
    blocks = [
        _front_matter(format_name, recipe, options.licence, family),
        f"# {recipe['name']}\n\nA vision-language model, trained with Sightline in the stage `{recipe.get('stage')}`"
        f" and exported as `{format_name}`.",
        f"## Opening it\n\n{OPENING[format_name]}{_needs(format_name, family)}",
        "## Recipe\n\n" + _table(("part", "value"), _recipe_rows(recipe, stage)),
        "## Data\n\n" + _table(("source", "weight"), _data_rows(stage)),
        "## Figures\n\n" + _figures(options.figures),
        f"## Parity with {parity.reference}\n\n"
        + _table(("check", "value", "bound"), _parity_rows(parity))
        + f"\n\nOver {parity.num_prompts} prompts with images.",
        f"## Licence\n\n{_licence(options.licence, recipe)}",
    ]
    write_text(directory / "README.md", "\n\n".join(blocks) + "\n")


def _needs(format_name: str, family: str) -> str:
    """A word about the processor of a family that knows videos as well."""
    from models.opening import needs_torchvision

    if format_name in ("adapter", "gguf") or not needs_torchvision(family):
        return ""
    return "\nIts processor knows videos as well, so `AutoProcessor` needs torchvision (`pip install torchvision`).\n"


def _front_matter(format_name: str, recipe: Mapping[str, Any], licence: str, family: str) -> str:
    bases = [path for path in _paths(recipe) if path.count("/") == 1]  # names of the hub
    lines = ["---", f"license: {licence}"]
    if licence == "other":
        lines.append("license_name: to-be-stated")
    lines += [f"library_name: {LIBRARIES.get(format_name, 'transformers')}", "pipeline_tag: image-text-to-text"]
    lines += ["base_model:", *(f"- {base}" for base in bases)] if bases else []
    lines += ["tags:", "- sightline", f"- {family}", "---"]
    return "\n".join(lines)


def _paths(recipe: Mapping[str, Any]) -> list[str]:
    parts = [part for part in recipe.get("model", {}).values() if isinstance(part, dict)]
    found = [*(part["path"] for part in parts if isinstance(part.get("path"), str))]
    own = recipe.get("model", {}).get("path")  # of a published model
    return [*([own] if isinstance(own, str) else []), *found]


def _recipe_rows(recipe: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for name, part in recipe.get("model", {}).items():
        if isinstance(part, dict):
            said = ", ".join(f"{key} {value}" for key, value in part.items() if value not in (None, False))
            yield name, said
        elif part is not None:
            yield name, part
    for name, tuning in stage.get("tune", {}).items():
        if tuning.get("kind") != "frozen":
            yield f"tuned: {name}", ", ".join(f"{key} {value}" for key, value in tuning.items() if value)
    for name in ("objective", "duration", "batch", "engine"):
        if isinstance(stage.get(name), dict):
            values = {key: value for key, value in stage[name].items() if isinstance(value, (str, int, float))}
            yield name, ", ".join(f"{key} {value}" for key, value in values.items())
    template = stage.get("data", {}).get("template", {})
    yield "template", template.get("kind", "")
    yield "seed", recipe.get("seed", "")


def _data_rows(stage: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for source in stage.get("data", {}).get("sources", ()):
        yield source.get("path", ""), source.get("weight") or "by its size"


def _parity_rows(parity: Parity) -> Iterator[tuple[object, ...]]:
    for check in parity.checks:
        value = f"{check.value:.3g}"
        yield (
            check.name,
            f"{value} ({check.note})" if check.note else value,
            ("" if check.bound is None else f"{check.bound:.3g}"),
        )


def _figures(file: Path | None) -> str:
    if file is None:
        return "None were given; `sightline export --figures FILE` puts in what `sightline eval` has measured."
    evaluation = read_value(file)
    try:
        rows = list(_figure_rows(evaluation))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--figures {file}: not what eval.run writes ({error!r}); give its OUT.json") from error
    return _table(("task", "metric", "value", "95 % interval", "samples"), rows)


def _figure_rows(evaluation: Any) -> Iterator[tuple[object, ...]]:
    for result in evaluation["results"]:
        for metric, value in result["metrics"].items():
            interval = result["intervals"].get(metric)
            span = f"{interval['low']:.4g} to {interval['high']:.4g}" if interval else ""
            yield result["name"], metric, "-" if value is None else f"{value:.4f}", span, result["num_samples"]


def _licence(licence: str, recipe: Mapping[str, Any]) -> str:
    parts = ", ".join(f"`{path}`" for path in _paths(recipe)) or "nothing published"
    stated = "To be stated by who publishes it" if licence == "other" else f"`{licence}`"
    return f"{stated}. It was made from {parts}, and from the data above, whose own licences hold as well."


def _table(header: tuple[str, ...], rows: Iterator[tuple[object, ...]] | list[tuple[object, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
