"""What `make families` runs: shared data and backbones, then for each twin its stages, its bundle and its scores.

    shared: world --> clip, vit, text encoder, language, open_clip; tars of it      made once, used by every twin
    each twin: its recipe with paths under RUN --> stages --> bundle --> scores

A new family is one line of TWINS. Owns the commands; how they are run and remembered is the quickstart's runner.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.spec import Config
from tools.quickstart.steps import Step

RECIPES = Path("recipes")
SHIPPED = "runs/families"
"""Where the twins' recipes lay things; another RUN takes its place in them."""


@dataclass(frozen=True)
class Twin:
    """A recipe in recipes/, the shared steps that it needs, and whether its heads for future tokens are measured."""

    recipe: str
    needs: tuple[str, ...]
    held_out: str = "world"
    """The shared world whose exam it takes."""
    speculates: bool = False


TWINS = (
    Twin("vicuna7b_clip_linear_tiny", ("clip", "language", "shards align", "shards lora")),
    Twin("qwen05b_clip_mlp_tiny", ("clip", "language", "shards align", "shards lora")),
    Twin(
        "smollm_vit_qformer_tiny",
        ("vit", "text_encoder", "language", "shards align", "shards lora", "shards pairs", "shards held_out_pairs"),
    ),
    Twin(
        "qwen3b_vit_mlp_anyres_tiny",
        ("clip", "language", "shards_2x align", "shards_2x lora"),
        held_out="world_2x",
    ),
    Twin("openclip_decoder_mtp_tiny", ("open_clip", "language", "shards lora"), speculates=True),
    Twin("llava15_tiny", ("clip", "language", "shards align", "shards lora")),
)


class Sizes(Config):
    """How much is drawn, trained and asked; the defaults reach the documented scores, tests take far fewer."""

    num_scenes: int = 9000
    num_held_out: int = 500
    num_scored: int = 500
    clip_steps: int | None = None
    vit_steps: int | None = None
    language_steps: int | None = None
    overrides: tuple[str, ...] = ()
    """Put behind every training command."""


def plan(run: Path, sizes: Sizes, seed: int, names: Sequence[str]) -> list[Step]:
    """The shared steps that the twins of these names need, then the twins', in an order in which needs come first."""
    chosen = [twin for twin in TWINS if twin.recipe in names]
    shared = {step.name: step for step in _shared(run / "shared", sizes, seed)}
    wanted = {need for twin in chosen for need in twin.needs}
    for step in reversed(shared.values()):
        wanted |= set(step.needs) if step.name in wanted else set()
    steps = [step for step in shared.values() if step.name in wanted]
    for twin in chosen:
        steps += _twin(twin, run, sizes)
    return steps


def _python(module: str, *words: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *(str(word) for word in words))


def _shared(place: Path, sizes: Sizes, seed: int) -> list[Step]:
    """World, backbones and tars; the 2x world has the same scenes, twice as wide and high."""
    world, scenes = place / "world", ("--scenes", sizes.num_scenes, "--held-out", sizes.num_held_out)

    def toy(name: str, verb: str, *words: object, needs: str = "world") -> Step:
        return Step(name, _python("tools.toy", verb, *words), (place / name,), (needs,) if needs else ())

    def steps_of(number: int | None) -> tuple[object, ...]:
        return () if number is None else ("--steps", number)

    draw, seeded = ("--seed", seed), ("--seed", seed)
    backbones = [
        toy("world", "world", world, *scenes, *draw, needs=""),
        toy("world_2x", "world", place / "world_2x", *scenes, *draw, "--scale", 2, needs=""),
        toy("clip", "clip", world, place / "clip", *seeded, *steps_of(sizes.clip_steps)),
        toy("vit", "vit", world, place / "vit", *seeded, *steps_of(sizes.vit_steps)),
        toy("text_encoder", "text-encoder", world, place / "text_encoder", *seeded),
        toy("language", "language", world, place / "language", *seeded, *steps_of(sizes.language_steps)),
        toy("open_clip", "open-clip", place / "clip", place / "open_clip", needs="clip"),
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


def place_recipe(twin: Twin, run: Path) -> Path:
    """Write the twin's recipe with its paths under `run`; where it then lies."""
    text = (RECIPES / f"{twin.recipe}.yaml").read_text(encoding="utf-8")
    text = text.replace("run: runs/quickstart", f"run: {SHIPPED}/{twin.recipe}")  # the quickstart's own recipe
    text = text.replace("runs/quickstart/", f"{SHIPPED}/shared/").replace(SHIPPED, str(run))
    placed = run / "recipes" / f"{twin.recipe}.yaml"
    placed.parent.mkdir(parents=True, exist_ok=True)
    placed.write_text(text, encoding="utf-8")
    return placed


def _twin(twin: Twin, run: Path, sizes: Sizes) -> list[Step]:
    """Train every stage, merge the last, score it, and measure speculation where it has heads for that."""
    from trainer.recipe import load_recipe

    recipe, name, home = place_recipe(twin, run), twin.recipe, run / twin.recipe
    last = list(load_recipe(recipe).stages)[-1]
    train = _python("trainer.main", recipe, "--stage", "all", *sizes.overrides)
    finished, bundle, scores = home / last / "finished.json", home / "bundle", home / "scores.json"
    exam = write_suite(twin, run, sizes)
    steps = [
        Step(f"train {name}", train, (finished,), twin.needs, owns=(home,)),
        Step(f"bundle {name}", _python("tools.merge", home, "--out", bundle), (bundle,), (f"train {name}",)),
        Step(
            f"score {name}",
            _python("eval.run", bundle, "--suite", exam, "--out", scores),
            (scores,),
            (f"bundle {name}",),
        ),
    ]
    if twin.speculates:
        folder = run / "shared" / twin.held_out / "held_out"
        words = ("--images", folder / "images", "--limit", 100)
        out = home / "speculation.json"
        command = _python("eval.speculate", bundle, *words, "--out", out)
        steps.append(Step(f"speculate {name}", command, (out,), (f"bundle {name}",)))
    return steps


def write_suite(twin: Twin, run: Path, sizes: Sizes) -> Path:
    """The exam of one twin, as eval.run's suite: questions with the right pictures and with exchanged ones."""
    held_out = run / "shared" / twin.held_out / "held_out"
    task = (
        f"kind: vqa, questions: {held_out / 'questions.json'}, annotations: {held_out / 'annotations.json'}, "
        f"images: {held_out / 'images'}, limit: {sizes.num_scored}"
    )
    file = run / "recipes" / f"{twin.recipe}_suite.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"- {{{task}, shuffle_pictures: {shuffled}}}\n" for shuffled in ("false", "true")]
    file.write_text("".join(lines), encoding="utf-8")
    return file
