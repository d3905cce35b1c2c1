"""What `make families` runs: shared data and backbones, then each tiny config's stages, bundle and scores.

    shared: worlds --> clip, vit, text encoder, languages, open_clip, native; tars    made once, used by every one
    each: its recipe with paths under RUN --> stages --> bundle --> scores

A new family is one line of TINY_CONFIGS. Owns the commands; how they are run and remembered is the quickstart's runner.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.spec import Config
from tools.examples.quickstart.steps import Step

RECIPES = Path("recipes")
SHIPPED = "runs/families"
"""The directory in the shipped recipes, which another RUN replaces."""


@dataclass(frozen=True)
class TinyConfig:
    """A recipe in recipes/, the shared steps that it needs, and whether its heads for future tokens are measured."""

    recipe: str
    needs: tuple[str, ...]
    held_out: tuple[str, ...] = ("world",)
    """The shared worlds whose exams it is scored on."""
    speculates: bool = False


TINY_CONFIGS = (
    TinyConfig("vicuna7b_clip_linear_tiny", ("clip", "language", "shards align", "shards lora")),
    TinyConfig("qwen05b_clip_mlp_tiny", ("clip", "language", "shards align", "shards lora")),
    TinyConfig(
        "smollm_vit_qformer_tiny",
        ("vit", "text_encoder", "language", "shards align", "shards lora", "shards pairs", "shards held_out_pairs"),
    ),
    TinyConfig(
        "qwen3b_vit_mlp_anyres_tiny",
        ("clip", "language", "shards_2x align", "shards_2x lora"),
        held_out=("world_2x",),
    ),
    TinyConfig("openclip_decoder_mtp_tiny", ("open_clip", "language", "shards lora"), speculates=True),
    TinyConfig("llava15_tiny", ("clip", "language", "shards align", "shards lora")),
    TinyConfig(
        "qwen3vl_tiny",
        ("native", "shards align", "shards lora", "shards_2x align", "shards_2x lora"),
        held_out=("world", "world_2x"),
    ),
)


class FamilySizes(Config):
    """Numbers of scenes, steps and questions; the defaults reach the documented scores, tests use far fewer."""

    num_scenes: int = 9000
    num_held_out: int = 500
    num_scored: int = 500
    clip_steps: int | None = None
    vit_steps: int | None = None
    language_steps: int | None = None
    native_steps: int | None = None
    overrides: tuple[str, ...] = ()
    """Appended to every training command."""


def plan(run: Path, sizes: FamilySizes, seed: int, names: Sequence[str]) -> list[Step]:
    """The shared steps that the tiny configs of these names need, then their own, in the order of their needs."""
    chosen = [config for config in TINY_CONFIGS if config.recipe in names]
    shared = {step.name: step for step in _shared(run / "shared", sizes, seed)}
    wanted = {need for config in chosen for need in config.needs}
    for step in reversed(shared.values()):
        wanted |= set(step.needs) if step.name in wanted else set()
    steps = [step for step in shared.values() if step.name in wanted]
    for config in chosen:
        steps += _steps_of(config, run, sizes)
    return steps


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *(str(argument) for argument in arguments))


def _shared(place: Path, sizes: FamilySizes, seed: int) -> list[Step]:
    """World, backbones and tars; the 2x world has the same scenes, twice as wide and high."""
    world, larger = place / "world", place / "world_2x"
    scenes, qwen3 = ("--scenes", sizes.num_scenes, "--held-out", sizes.num_held_out), ("--kind", "qwen3")

    def synthetic(name: str, verb: str, *arguments: object, needs: tuple[str, ...] = ("world",)) -> Step:
        return Step(name, _python("tools.toy", verb, *arguments), (place / name,), needs)

    def steps_of(number: int | None) -> tuple[object, ...]:
        return () if number is None else ("--steps", number)

    draw, seeded = ("--seed", seed), ("--seed", seed)
    backbones = [
        synthetic("world", "world", world, *scenes, *draw, needs=()),
        synthetic("world_2x", "world", larger, *scenes, *draw, "--scale", 2, needs=()),
        synthetic("clip", "clip", world, place / "clip", *seeded, *steps_of(sizes.clip_steps)),
        synthetic("vit", "vit", world, place / "vit", *seeded, *steps_of(sizes.vit_steps)),
        synthetic("text_encoder", "text-encoder", world, place / "text_encoder", *seeded),
        synthetic("language", "language", world, place / "language", *seeded, *steps_of(sizes.language_steps)),
        synthetic("open_clip", "open-clip", place / "clip", place / "open_clip", needs=("clip",)),
        synthetic("qwen3", "language", world, place / "qwen3", *seeded, *steps_of(sizes.language_steps), *qwen3),
        synthetic(
            "native",
            "qwen3-vl",
            *(place / "qwen3", place / "native", *seeded, *steps_of(sizes.native_steps)),
            *("--worlds", world, larger),
            needs=("world", "world_2x", "qwen3"),
        ),
    ]
    tars = []
    for drawn, kind in (("world", "shards"), ("world_2x", "shards_2x")):
        for stage in ("align", "lora"):
            folder = place / drawn
            tars.append(_shards(place / kind / stage, drawn, ("--llava", folder / f"{stage}.json"), folder))
    for name, folder in (("pairs", world), ("held_out_pairs", world / "held_out")):
        tars.append(_shards(place / "shards" / name, "world", ("--captions", folder / "pairs.json"), folder))
    return [*backbones, *tars]


def _shards(out: Path, world: str, source: tuple[object, ...], folder: Path) -> Step:
    command = _python("tools.shards", "make", out, *source, "--images", folder / "images")
    return Step(f"{out.parent.name} {out.name}", command, (out,), (world,))


def place_recipe(config: TinyConfig, run: Path) -> Path:
    """Write the config's recipe with its paths under `run`; returns its file."""
    text = (RECIPES / f"{config.recipe}.yaml").read_text(encoding="utf-8")
    text = text.replace("run: runs/quickstart", f"run: {SHIPPED}/{config.recipe}")  # the quickstart's own recipe
    text = text.replace("runs/quickstart/", f"{SHIPPED}/shared/").replace(SHIPPED, str(run))
    placed = run / "recipes" / f"{config.recipe}.yaml"
    placed.parent.mkdir(parents=True, exist_ok=True)
    placed.write_text(text, encoding="utf-8")
    return placed


def _steps_of(config: TinyConfig, run: Path, sizes: FamilySizes) -> list[Step]:
    """Train every stage, merge the last, score it, and measure speculation where it has heads for that."""
    from trainer.config.recipe import load_recipe

    recipe, name, home = place_recipe(config, run), config.recipe, run / config.recipe
    last = list(load_recipe(recipe).stages)[-1]
    train = _python("trainer.main", recipe, "--stage", "all", *sizes.overrides)
    finished, bundle, scores = home / last / "finished.json", home / "bundle", home / "scores.json"
    exam = write_suite(config, run, sizes)
    steps = [
        Step(f"train {name}", train, (finished,), config.needs, owns=(home,)),
        Step(f"bundle {name}", _python("tools.merge", home, "--out", bundle), (bundle,), (f"train {name}",)),
        Step(
            f"score {name}",
            _python("eval.run", bundle, "--suite", exam, "--out", scores),
            (scores,),
            (f"bundle {name}",),
        ),
    ]
    if config.speculates:
        folder = run / "shared" / config.held_out[0] / "held_out"
        asked = ("--images", folder / "images", "--limit", 100)
        out = home / "speculation.json"
        command = _python("eval.speculate", bundle, *asked, "--out", out)
        steps.append(Step(f"speculate {name}", command, (out,), (f"bundle {name}",)))
    return steps


def write_suite(config: TinyConfig, run: Path, sizes: FamilySizes) -> Path:
    """The exam of one config, as eval.run's suite: questions with the right images and with exchanged ones.

    Of several worlds, tasks beyond the first world's have its name.
    """
    lines = []
    for world in config.held_out:
        held_out = run / "shared" / world / "held_out"
        task = (
            f"kind: vqa, questions: {held_out / 'questions.json'}, annotations: {held_out / 'annotations.json'}, "
            f"images: {held_out / 'images'}, limit: {sizes.num_scored}"
        )
        for shuffled in (False, True):
            named = "" if world == config.held_out[0] else f", name: vqa_{world}{'_shuffled' if shuffled else ''}"
            lines.append(f"- {{{task}, shuffle_pictures: {str(shuffled).lower()}{named}}}\n")
    file = run / "recipes" / f"{config.recipe}_suite.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
    return file
