"""Checkpoint + base -> a bundle in Hugging Face format: `python -m tools.merge RUN --stage lora --out OUT`.

    base weights --one tensor at a time--> + what was trained, + alpha / rank * B A  --> OUT/*.safetensors
    OUT is then opened by stock transformers and compared with the trained model: no bundle without that report.

`--untrained` exports a stage as it would start, which is what "before training" means.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError, run_cli
from models.files import new_directory
from models.source import digest_of, directory_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.build import Facts
    from models.vlm import VLM
    from trainer.checkpoint import CheckpointReader
    from trainer.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """What a bundle is made from: a stage of a recipe, and its checkpoint (None: untrained)."""

    recipe: Recipe
    stage: str
    reader: CheckpointReader | None


def main(argv: list[str]) -> int:
    """Merge and report; 0 when the bundle is there and its parity holds."""
    arguments = _parse(argv)
    source = _find(arguments)
    bundle = merge(source, arguments.out, force=arguments.force)
    print(f"{bundle}: {source.recipe.name}/{source.stage}, open it with: sightline demo {bundle}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.merge", description="Merge a checkpoint into a bundle.")
    parser.add_argument("run", type=Path, help="a run's directory, or with --untrained a recipe")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default: the finished one")
    parser.add_argument("--untrained", action="store_true", help="export the stage as it would start")
    parser.add_argument("--force", action="store_true", help="write the bundle even if its parity fails")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set in the recipe, with --untrained")
    return parser.parse_intermixed_args(argv)


def _find(arguments: argparse.Namespace) -> Source:
    from trainer.checkpoint import CheckpointReader
    from trainer.recipe import load_recipe
    from trainer.weights import finished_checkpoint

    if arguments.untrained:
        recipe = load_recipe(arguments.run, arguments.overrides)
        recipe.stage(arguments.stage)
        return Source(recipe, arguments.stage, None)
    if not (arguments.run / "recipe.json").is_file():
        raise InputError(f"{arguments.run}: no recipe.json in it; give the directory of a run (the recipe's `run`)")
    recipe = load_recipe(arguments.run / "recipe.json")
    recipe.stage(arguments.stage)
    if arguments.step is not None:
        checkpoint = arguments.run / arguments.stage / "checkpoints" / f"step_{arguments.step:06d}"
        if not checkpoint.is_dir():
            found = sorted(path.name for path in checkpoint.parent.glob("step_*"))
            raise InputError(f"{checkpoint}: no such checkpoint; there are {', '.join(found) or 'none'}")
        return Source(recipe, arguments.stage, CheckpointReader(checkpoint))
    finished = finished_checkpoint(arguments.run, arguments.stage)
    if finished is None:
        raise InputError(
            f"{arguments.run / arguments.stage}: not finished; finish it, or name a checkpoint with --step"
        )
    return Source(recipe, arguments.stage, CheckpointReader(finished))


def merge(source: Source, out: Path, *, force: bool = False) -> Path:
    """Write the bundle of a source to `out`; raises InputError where the base has changed or parity fails."""
    import torch

    from data_pipeline.templates import build_template, stop_id
    from data_pipeline.tokens import Tokens
    from models.build import read_facts
    from models.bundle import write_manifest
    from models.export import check_exportable, generation_config, llava_config, processor
    from tools.parity import compare_with_trained

    config = source.recipe.stage(source.stage)
    model = source.recipe.model
    check_exportable(model)
    _check_base(source)
    precision = config.engine.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    facts = read_facts(model, config.data.max_length)
    tokens = Tokens.of(facts.tokenizer)
    template = build_template(config.data.template, tokens)
    reference = _trained_model(source, facts, dtype)
    with new_directory(out) as directory:
        _write_weights(source, facts, reference, directory, dtype)
        llava_config(model, facts, dtype).save_pretrained(directory)
        generation_config(facts, stop_id(template, tokens)).save_pretrained(directory)
        processor(model, facts, template.jinja()).save_pretrained(directory)
        parity = compare_with_trained(reference, facts, template, directory, precision)
        if not parity.passed and not force:
            failed = [
                f"{check.name} is {check.value:.3g}, bound {check.bound}" for check in parity.checks if not check.passed
            ]
            raise InputError(
                f"{out}: the bundle differs from the trained model ({'; '.join(failed)}); --force writes it"
            )
        parents = {"checkpoint": str(source.reader.directory) if source.reader else "untrained", **_base(source)}
        recipe = source.recipe.model_dump(mode="json")
        write_manifest(
            directory, recipe={**recipe, "stage": source.stage}, precision=precision, parents=parents, parity=parity
        )
    return out


def _base(source: Source) -> dict[str, str]:
    from trainer.weights import base_digests

    return base_digests(source.recipe)


def _check_base(source: Source) -> None:
    """The pretrained parts must be those the checkpoint was trained on."""
    if source.reader is None:
        return
    for part, digest in source.reader.state["base"].items():
        directory = directory_of(getattr(source.recipe.model, part).path)
        if digest_of(directory) != digest:
            raise InputError(
                f"{directory}: not the {part} weights that {source.reader.directory} was trained on (sha256)"
            )


def _trained_model(source: Source, facts: Facts, dtype: torch.dtype) -> VLM:
    """The model as training has it: base, projector and adapters apart. What the bundle is compared with.

    The base is whole, also where training held it in 4 or 8 bits: that is what adapters are merged into.
    """
    from models.build import build_vlm
    from models.config import PretrainedLanguage
    from trainer.streams import stream_seed
    from trainer.tuning import apply_plan
    from trainer.weights import load_weights

    model = source.recipe.model
    assert isinstance(model.language, PretrainedLanguage), "check_exportable has seen to that"
    model = model.model_copy(update={"language": model.language.model_copy(update={"load": "full"})})
    vlm = build_vlm(model, facts, frozen_dtype=dtype, seed=stream_seed(source.recipe.seed, "projector"))
    if source.reader is not None:
        apply_plan(vlm, source.recipe.stage(source.stage).tune, seed=0)
        load_weights(vlm, source.reader)
    return vlm.eval()


def _write_weights(source: Source, facts: Facts, vlm: VLM, directory: Path, dtype: torch.dtype) -> None:
    from models.export import num_vocabulary_rows, projector_tensors, with_image_row
    from models.sharded import ShardedWriter

    writer = ShardedWriter(directory)
    for name, value in _vision_tensors(source, vlm):
        writer.add(name, value.to(dtype))
    projector = {name: value.detach() for name, value in vlm.projector.named_parameters()}
    for name, value in projector_tensors(source.recipe.model, projector):
        writer.add(name, value.to(dtype))
    rows = num_vocabulary_rows(facts)
    for name, value in _language_tensors(source):
        writer.add(f"language_model.{name}", with_image_row(name, value, rows).to(dtype))
    writer.close()


def _vision_tensors(source: Source, vlm: VLM) -> Iterator[tuple[str, Tensor]]:
    from models.export import vision_name

    for name, value in vlm.vision.model.state_dict().items():
        if not name.endswith("position_ids"):
            yield vision_name(source.recipe.model.vision.kind, name), value


def _language_tensors(source: Source) -> Iterator[tuple[str, Tensor]]:
    """The base language model's tensors, each replaced or adapted by what was trained, merged in fp32."""
    from models.sharded import read_tensors

    language: Any = source.recipe.model.language
    trained = set(source.reader.names()) if source.reader is not None else set()
    scaling = lora_scaling(source)
    for name, value in read_tensors(directory_of(language.path)):
        if f"language.{name}" in trained:
            assert source.reader is not None
            yield name, source.reader.weight(f"language.{name}")
        elif (stem := f"language.{name.removesuffix('.weight')}") + ".lora_A.default.weight" in trained:
            assert source.reader is not None
            down = source.reader.weight(f"{stem}.lora_A.default.weight")
            up = source.reader.weight(f"{stem}.lora_B.default.weight")
            yield name, value.float() + scaling * (up @ down)
        else:
            yield name, value


def lora_scaling(source: Source) -> float:
    """alpha / rank of the adapters in a checkpoint, or 0 where there are none."""
    from trainer.config import Lora

    tuning = source.recipe.stage(source.stage).tune.language
    return tuning.alpha / tuning.rank if isinstance(tuning, Lora) else 0.0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
