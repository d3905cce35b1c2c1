"""Checkpoint + base -> a bundle in Hugging Face format: `python -m tools.merge RUN OUT --stage lora`.

    base weights --one tensor at a time--> + what was trained, + alpha / rank * B A  --> OUT/*.safetensors
    OUT is then read by stock transformers and compared with the trained model; every bundle has that report.

`--untrained` exports a stage as it would start, to measure it before training. A checkpoint of plain DeepSpeed
(`tools.export.deepspeed_checkpoint`) becomes a model directory over the base that `--base` names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError, run_cli
from models.common.files import new_directory
from tools.export.arguments import add_golden, add_out, golden_set, out_of, writing
from tools.export.merging import PartMerge

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data_pipeline.templates import Template
    from data_pipeline.tokens import Tokens
    from models.build import ModelMetadata
    from models.bundle import Precision
    from tools.export.golden import Probe
    from tools.export.reference import Trained
    from trainer.checkpoint.reader import CheckpointReader
    from trainer.config.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """The source of a bundle: a stage of a recipe, and its checkpoint (None: untrained)."""

    recipe: Recipe
    stage: str
    reader: CheckpointReader | None


def main(argv: list[str]) -> int:
    """Merge and report; returns 0 if the bundle is written and passes its parity check."""
    arguments = _parse(argv)
    from tools.export.deepspeed_checkpoint import is_deepspeed
    from tools.export.merge_deepspeed import merge_plain

    out = out_of(arguments)
    if is_deepspeed(arguments.run):
        with writing(out):
            print(merge_plain(arguments.run, out, base=arguments.base, lora_alpha=arguments.lora_alpha))
        return 0
    source = find_source(arguments)
    with writing(out):
        merge(source, out, probes=golden_set(arguments), force=arguments.force, memory_gb=arguments.memory_gb)
    print(f"{out}: {source.recipe.name}/{source.stage}, open it with: sightline demo {out}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.merge", description="Merge a checkpoint into a bundle.")
    add_source(parser)
    add_out(parser)
    add_golden(parser)
    parser.add_argument("--force", action="store_true", help="write the bundle even if its parity fails")
    parser.add_argument("--base", type=Path, help="plain DeepSpeed: the model directory that was trained")
    parser.add_argument("--lora-alpha", type=float, help="plain DeepSpeed: peft's lora_alpha, where it holds adapters")
    return parser.parse_intermixed_args(argv)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for what to merge; `tools.bundle` has the same."""
    parser.add_argument("run", type=Path, help="a run, one of its checkpoints, or with --untrained a recipe")
    parser.add_argument("--stage", help="the stage of the run; default: its last one")
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default: the finished one")
    parser.add_argument("--untrained", action="store_true", help="export the stage as it would start")


def find_source(arguments: argparse.Namespace) -> Source:
    """The stage and checkpoint that a command line names.

    Raises:
        InputError: no such run, stage or checkpoint, a stage that is not finished, or overrides without --untrained.
    """
    from trainer.checkpoint.initial_weights import finished_checkpoint
    from trainer.checkpoint.reader import CheckpointReader
    from trainer.config.recipe import load_recipe

    run: Path = arguments.run
    overrides = [each for each in arguments.others if "=" in each]
    if arguments.untrained:
        recipe = load_recipe(run, overrides)
        stage = arguments.stage or next(iter(recipe.stages))
        recipe.stage(stage)
        return Source(recipe, stage, None)
    if overrides:
        raise InputError(f"{overrides[0]}: the recipe of a run stands; only --untrained takes other values")
    if (run / "COMMIT").is_file() and run.parent.name == "checkpoints":
        recipe = load_recipe(run.parents[2] / "recipe.json")
        return Source(recipe, run.parents[1].name, CheckpointReader.open(run))
    if not (run / "recipe.json").is_file():
        raise InputError(f"{run}: no recipe.json in it; give the directory of a run (the recipe's `run`)")
    recipe = load_recipe(run / "recipe.json")
    stage = arguments.stage or list(recipe.stages)[-1]
    recipe.stage(stage)
    if arguments.step is not None:
        return Source(recipe, stage, CheckpointReader.open(_checkpoint(run, stage, arguments.step)))
    finished = finished_checkpoint(run, stage)
    if finished is None:
        raise InputError(f"{run / stage}: not finished; finish it, or name a checkpoint with --step")
    return Source(recipe, stage, CheckpointReader.open(finished))


def _checkpoint(run: Path, stage: str, step: int) -> Path:
    from trainer.checkpoint.format import checkpoints_in, name_of

    checkpoint = run / stage / "checkpoints" / name_of(step)
    if not checkpoint.is_dir():
        found = [path.name for path in checkpoints_in(checkpoint.parent)]
        raise InputError(f"{checkpoint}: no such checkpoint; there are {', '.join(found) or 'none'}")
    return checkpoint


def merge(
    source: Source, out: Path, *, probes: list[Probe], force: bool = False, memory_gb: float | None = None
) -> Path:
    """Write the bundle of a source to `out`, atomically.

    Args:
        probes: the golden set that bundle and trained model are compared on.
        force: write it even if parity fails.
        memory_gb: the memory for opening the whole bundle, by default what is free.

    Raises:
        InputError: the base's sha256 is not the one that was trained on, the stage trains no language model, or parity
            fails.
    """
    return merge_loaded(load(source), source, out, probes, force=force, memory_gb=memory_gb)


def merge_loaded(
    loaded: Loaded, source: Source, out: Path, probes: list[Probe], *, force: bool, memory_gb: float | None
) -> Path:
    """`merge` of what is open already."""
    from tools.export.answering import Limits, finish
    from tools.export.parity import compare, read_bundle, read_trained

    with new_directory(out) as directory:
        precision = write_model(loaded, directory, source.recipe.stage(source.stage).engine.precision)
        reference = read_trained(loaded.trained, loaded.template, probes)
        parity = compare(reference, read_bundle(directory, probes), precision, "the trained model")
        recipe = {**source.recipe.model_dump(mode="json"), "stage": source.stage}
        refusal = f"{out}: the bundle differs from the trained model"
        limits = Limits(force, memory_gb)
        facts = {"recipe": recipe, "precision": precision, "parents": loaded.parents}
        finish(directory, probes, parity, refusal, limits, **facts)
    return out


@dataclass(frozen=True)
class Loaded:
    """The trained model of a source, its template, and the names or digests of what it was made from."""

    trained: Trained
    template: Template
    tokens: Tokens
    parents: dict[str, str]


def load(source: Source) -> Loaded:
    """Open what a source trained; the language model's weights are read later, one by one.

    Raises:
        InputError: the base's sha256 is not the one that was trained on, or the stage trains no language model.
    """
    from data_pipeline.templates import build_template
    from data_pipeline.tokens import Tokens
    from models.build import read_metadata
    from tools.export.reference import Trained
    from trainer.distributed.seeding import derive_seed

    config, model = source.recipe.stage(source.stage), source.recipe.model
    if config.objective.reader != "language":
        raise InputError(f"{source.stage}: it trains no language model, so nothing could answer; merge a later stage")
    facts = read_metadata(model, config.data.max_length)
    base = _checked_base(source, facts)
    tokens = Tokens.of(facts.tokenizer, facts.text.image_token)
    template = build_template(config.data.template, tokens)
    seed = derive_seed(source.recipe.seed, "projector")
    trained = Trained.load(model, config, facts, source.reader, seed=seed)
    parents = {"checkpoint": str(source.reader.directory) if source.reader else "untrained", **base}
    return Loaded(trained, template, tokens, parents)


def write_model(loaded: Loaded, directory: Path, precision: Precision) -> Precision:
    """Write weights, configuration, tokenizer and processor of a bundle, without its manifest.

    Args:
        precision: that the stage was trained in.

    Returns:
        What the bundle is compared by: a published model's files may be coarser.
    """
    from data_pipeline.templates import stop_id
    from models.bundle_files import save_config, save_processor
    from models.export import generation_config, llava_config, processor
    from tools.export.write_back import copy_side_files, keep_bounds, write_back

    trained = loaded.trained
    model, facts, layout = trained.model, trained.facts, trained.model.layout
    if layout is not None:
        copy_side_files(layout, directory, loaded.template.jinja(), stop_id(loaded.template, loaded.tokens))
        keep_bounds(layout, directory, facts.image.fit)
        return write_back(trained, layout, directory, precision)
    _write_weights(trained, directory)
    save_config(llava_config(model, facts, trained.dtype, trained.vision.model.config), directory)
    generation_config(facts, stop_id(loaded.template, loaded.tokens)).save_pretrained(directory)
    save_processor(processor(model, facts, loaded.template.jinja()), directory)
    return precision


def _checked_base(source: Source, facts: ModelMetadata) -> dict[str, str]:
    """The digests of the pretrained parts; InputError where the checkpoint was trained with others or otherwise."""
    from trainer.checkpoint.identity import check, compare, digests_of, record_of

    digests, reader = digests_of(source.recipe), source.reader
    found = digests["base"]
    if reader is None:
        return found
    recorded = reader.part("base")
    for part in ("vision", "language"):
        if part in found and recorded.get(part, found[part]) != found[part]:
            read = getattr(source.recipe.model, part).facts()
            where = read.directory or read.source
            raise InputError(f"{where}: not the {part} weights that {reader.directory} was trained on (sha256)")
    now = record_of(source.recipe, source.stage, digests=digests, image=facts.image, text=facts.text)
    table = [field for field in compare(reader.state, now) if not field.is_place]  # the data need not be here
    recipe_file = reader.directory.parents[2] / "recipe.json"
    check(table, reader.directory, recipe_file, advice=f"{recipe_file} must say how it was trained")
    return found


def _write_weights(trained: Trained, directory: Path) -> None:
    from tqdm import tqdm

    from models.common.sharded import ShardedWriter
    from models.export import num_vocabulary_rows, projector_tensors, with_image_row

    writer = ShardedWriter(directory)
    for name, value in module_tensors(trained, "vision", trained.vision.model):
        if not name.endswith("position_ids"):
            writer.add(trained.model.vision.export_name(name), value.to(trained.dtype))
    projector = dict(module_tensors(trained, "projector", trained.projector))
    for name, value in projector_tensors(trained.model, projector):
        writer.add(name, value.to(trained.dtype))
    for name, value in trained.mtp.named_parameters() if trained.mtp is not None else ():
        writer.add(f"future.{name}", value.detach().to(trained.dtype))
    rows = num_vocabulary_rows(trained.facts)
    names = language_names(trained)
    for name, value in tqdm(language_tensors(trained, names), total=len(names), desc="merge", unit="tensor"):
        writer.add(f"language_model.{name}", with_image_row(name, value.to(trained.dtype), rows))
    writer.close()


def module_tensors(trained: Trained, part: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a part that is held in memory, with what was trained in them."""
    merge_of = PartMerge(trained, part)
    for name, value in module.state_dict().items():
        yield name, merge_of.merged(name, value.detach())
    merge_of.check_complete(trained.where)


def language_names(trained: Trained) -> list[str]:
    """The base language model's tensors without those that every loader computes or copies from the embedding."""
    is_tied = bool(getattr(trained.language.config, "tie_word_embeddings", False))
    left_out = ("lm_head.weight",) if is_tied else ()
    return [name for name in trained.language if not name.endswith("rotary_emb.inv_freq") and name not in left_out]


def language_tensors(trained: Trained, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The base language model's tensors, each replaced or adapted by what was trained, merged in fp32.

    Raises InputError where a trained weight has no counterpart in the base, so that nothing is lost silently.
    """
    base, merge_of = trained.language, PartMerge(trained, "language")
    for name in names:
        yield name, merge_of.merged(name, base.read(name))
    merge_of.check_complete(base.where)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
