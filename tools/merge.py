"""Checkpoint + base -> a bundle in Hugging Face format: `python -m tools.merge RUN OUT --stage lora`.

    base weights --one tensor at a time--> + what was trained, + alpha / rank * B A  --> OUT/*.safetensors
    OUT is then read by stock transformers and compared with the trained model: no bundle without that report.

`--untrained` exports a stage as it would start, which is what "before training" means. A checkpoint of plain DeepSpeed
(`tools.bundles.deepspeed`) becomes a model directory over the base that `--base` names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError, run_cli
from models.files import new_directory
from tools.bundles.words import add_golden, add_out, golden_set, out_of, writing

if TYPE_CHECKING:
    from torch import Tensor

    from tools.bundles.golden import Probe
    from tools.bundles.reference import Trained
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
    from tools.bundles.deepspeed import is_deepspeed
    from tools.bundles.plain import merge_plain

    arguments = _parse(argv)
    out = out_of(arguments)
    if is_deepspeed(arguments.run):
        with writing(out):
            print(merge_plain(arguments.run, out, base=arguments.base, lora_alpha=arguments.lora_alpha))
        return 0
    source = find_source(arguments)
    with writing(out):
        merge(source, out, probes=golden_set(arguments), force=arguments.force)
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
    """What to merge; `tools.bundle` takes the same."""
    parser.add_argument("run", type=Path, help="a run, one of its checkpoints, or with --untrained a recipe")
    parser.add_argument("--stage", help="the stage of the run; default: its last one")
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default: the finished one")
    parser.add_argument("--untrained", action="store_true", help="export the stage as it would start")


def find_source(arguments: argparse.Namespace) -> Source:
    """The stage and checkpoint that a command line names; raises InputError where there is no such thing."""
    from trainer.checkpoint import CheckpointReader
    from trainer.recipe import load_recipe
    from trainer.weights import finished_checkpoint

    run: Path = arguments.run
    overrides = [word for word in arguments.words if "=" in word]
    if arguments.untrained:
        recipe = load_recipe(run, overrides)
        stage = arguments.stage or next(iter(recipe.stages))
        recipe.stage(stage)
        return Source(recipe, stage, None)
    if overrides:
        raise InputError(f"{overrides[0]}: the recipe of a run stands; only --untrained takes other values")
    if (run / "COMMIT").is_file() and run.parent.name == "checkpoints":
        recipe = load_recipe(run.parents[2] / "recipe.json")
        return Source(recipe, run.parents[1].name, CheckpointReader(run))
    if not (run / "recipe.json").is_file():
        raise InputError(f"{run}: no recipe.json in it; give the directory of a run (the recipe's `run`)")
    recipe = load_recipe(run / "recipe.json")
    stage = arguments.stage or list(recipe.stages)[-1]
    recipe.stage(stage)
    if arguments.step is not None:
        return Source(recipe, stage, CheckpointReader(_checkpoint(run, stage, arguments.step)))
    finished = finished_checkpoint(run, stage)
    if finished is None:
        raise InputError(f"{run / stage}: not finished; finish it, or name a checkpoint with --step")
    return Source(recipe, stage, CheckpointReader(finished))


def _checkpoint(run: Path, stage: str, step: int) -> Path:
    checkpoint = run / stage / "checkpoints" / f"step_{step:06d}"
    if not checkpoint.is_dir():
        found = sorted(path.name for path in checkpoint.parent.glob("step_*"))
        raise InputError(f"{checkpoint}: no such checkpoint; there are {', '.join(found) or 'none'}")
    return checkpoint


def merge(source: Source, out: Path, *, probes: list[Probe], force: bool = False) -> Path:
    """Write the bundle of a source to `out`; raises InputError where the base has changed or parity fails."""
    from data_pipeline.templates import build_template, stop_id
    from data_pipeline.tokens import Tokens
    from models.build import read_facts
    from models.bundle import write_manifest
    from models.export import generation_config, llava_config, processor
    from tools.bundles.reference import Trained
    from tools.parity import compare, failed_checks, read_bundle, read_trained
    from trainer.streams import stream_seed

    config, model = source.recipe.stage(source.stage), source.recipe.model
    if config.objective.reader != "language":
        raise InputError(f"{source.stage}: it trains no language model, so nothing could answer; merge a later stage")
    base = _checked_base(source)
    facts = read_facts(model, config.data.max_length)
    tokens = Tokens.of(facts.tokenizer)
    template = build_template(config.data.template, tokens)
    seed = stream_seed(source.recipe.seed, "projector")
    trained = Trained.load(model, config, facts, source.reader, seed=seed)
    with new_directory(out) as directory:
        _write_weights(trained, directory)
        llava_config(model, facts, trained.dtype, trained.vision.model.config).save_pretrained(directory)
        generation_config(facts, stop_id(template, tokens)).save_pretrained(directory)
        processor(model, facts, template.jinja()).save_pretrained(directory)
        precision = config.engine.precision
        reference = read_trained(trained, template, probes)
        parity = compare(reference, read_bundle(directory, probes), precision, "the trained model")
        if not parity.passed and not force:
            raise InputError(
                f"{out}: the bundle differs from the trained model ({failed_checks(parity)}); --force writes it"
            )
        parents = {"checkpoint": str(source.reader.directory) if source.reader else "untrained", **base}
        recipe = {**source.recipe.model_dump(mode="json"), "stage": source.stage}
        write_manifest(directory, recipe=recipe, precision=precision, parents=parents, parity=parity)
    return out


def _checked_base(source: Source) -> dict[str, str]:
    """The digests of the pretrained parts, which must be those the checkpoint was trained on."""
    from trainer.weights import base_digests

    found = base_digests(source.recipe)
    recorded = source.reader.state["base"] if source.reader is not None else found
    for part, digest in found.items():
        if source.reader is not None and recorded.get(part, digest) != digest:
            config = getattr(source.recipe.model, part)
            where = getattr(config, "path", "") or getattr(config, "weights", "")
            raise InputError(f"{where}: not the {part} weights that {source.reader.directory} was trained on (sha256)")
    return found


def _write_weights(trained: Trained, directory: Path) -> None:
    from tqdm import tqdm

    from models.export import num_vocabulary_rows, projector_tensors, vision_name, with_image_row
    from models.sharded import ShardedWriter

    writer = ShardedWriter(directory)
    for name, value in trained.vision.model.state_dict().items():
        if not name.endswith("position_ids"):
            writer.add(vision_name(trained.model.vision.kind, name), value.to(trained.dtype))
    projector = {name: value.detach() for name, value in trained.projector.named_parameters()}
    for name, value in projector_tensors(trained.model, projector):
        writer.add(name, value.to(trained.dtype))
    for name, value in trained.future.named_parameters() if trained.future is not None else ():
        writer.add(f"future.{name}", value.detach().to(trained.dtype))
    rows = num_vocabulary_rows(trained.facts)
    for name, value in tqdm(language_tensors(trained), desc="merge", unit="tensor"):
        writer.add(f"language_model.{name}", with_image_row(name, value.to(trained.dtype), rows))
    writer.close()


def language_tensors(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """The base language model's tensors, each replaced or adapted by what was trained, merged in fp32.

    Raises InputError where something that was trained has no place in the base: nothing is lost in silence.
    """
    from trainer.weights import adapted_name

    base, scaling = trained.language, lora_scaling(trained.config)
    waiting = {name for name in trained.names if name.startswith("language.")}
    is_tied = bool(getattr(base.config, "tie_word_embeddings", False))
    for name in base:
        if name.endswith("rotary_emb.inv_freq") or (is_tied and name == "lm_head.weight"):
            continue  # computed by every loader, or the embedding once more
        value = base.read(name)
        for whole in (f"language.{name}", adapted_name(f"language.{name}")):
            if whole in waiting:
                waiting.discard(whole)
                value = trained.weight(whole)
        down, up = (f"language.{name.removesuffix('.weight')}.lora_{side}.default.weight" for side in "AB")
        if down in waiting:
            magnitude = f"language.{name.removesuffix('.weight')}.lora_magnitude_vector.default.weight"
            value = value.float().addmm_(trained.weight(up), trained.weight(down), alpha=scaling)
            if magnitude in waiting:  # DoRA: the rows of the sum give directions, the magnitudes their lengths
                value *= (trained.weight(magnitude) / value.norm(dim=1)).unsqueeze(1)
            waiting -= {down, up, magnitude}
        yield name, value
    if waiting:
        raise InputError(f"{base.where}: no place for {min(waiting)}, which was trained; is it another base?")


def lora_scaling(config: Any) -> float:
    """alpha / rank of a stage's adapters, or 0 where there are none."""
    from trainer.config import Lora

    tuning = config.tune.language
    return tuning.alpha / tuning.rank if isinstance(tuning, Lora) else 0.0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
