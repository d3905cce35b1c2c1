"""What the quickstart runs: every step is one command that a user could run, with the steps that it needs.

world -> clip, language -> shards -> align -> lora -> merged -> nf4 bundle -> scores -> report
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from models.spec import Config
from trainer.distributed.ports import choose_port

RECIPE = "recipes/llava15_tiny.yaml"
CAPTION_PROMPT = "Describe the picture."


class QuickstartSizes(Config):
    """Numbers of scenes and questions. The defaults reach the documented scores; tests use far fewer."""

    num_scenes: int = 9000
    num_held_out: int = 500
    num_scored: int = 500
    clip_steps: int | None = None
    language_steps: int | None = None
    overrides: tuple[str, ...] = ()
    """Appended to both training commands."""


@dataclass(frozen=True)
class Step:
    """One command. It is done when everything in `makes` exists and was made by the same command.

    `owns` is removed before another command runs the step again; by default it is `makes`.
    """

    name: str
    command: tuple[str, ...]
    makes: tuple[Path, ...]
    needs: tuple[str, ...] = ()
    cores: int = 1
    owns: tuple[Path, ...] = ()


def plan(run: Path, sizes: QuickstartSizes, seed: int) -> tuple[Step, ...]:
    """Every step of the quickstart in `run`, each after the steps that it needs."""
    return (*_world(run, sizes, seed), *_training(run, sizes, seed), *bundles(run), *_scores(run), _report(run))


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *(str(argument) for argument in arguments))


def _world(run: Path, sizes: QuickstartSizes, seed: int) -> tuple[Step, ...]:
    world = run / "world"
    clip_steps = () if sizes.clip_steps is None else ("--steps", sizes.clip_steps)
    language_steps = () if sizes.language_steps is None else ("--steps", sizes.language_steps)
    counts = ("--scenes", sizes.num_scenes, "--held-out", sizes.num_held_out, "--seed", seed)
    shards = tuple(
        Step(
            f"shards {stage}",
            _python(
                "tools.shards", "make", run / "shards" / stage, "--llava", world / f"{stage}.json",
                "--images", world / "images",
            ),
            (run / "shards" / stage,),
            ("world",),
        )
        for stage in ("align", "lora")
    )  # fmt: skip
    return (
        Step("world", _python("tools.toy", "world", world, *counts), (world,)),
        Step(
            "clip",
            _python("tools.toy", "clip", world, run / "clip", "--seed", seed, *clip_steps),
            (run / "clip",),
            ("world",),
        ),
        Step(
            "language",
            _python("tools.toy", "language", world, run / "language", "--seed", seed, *language_steps),
            (run / "language",),
            ("world",),
        ),
        *shards,
    )


def recipe_arguments(run: Path, sizes: QuickstartSizes, seed: int) -> tuple[str, ...]:
    """The recipe with overrides for this quickstart's paths."""
    return (
        RECIPE,
        f"run={run}",
        f"seed={seed}",
        f"model.vision.path={run / 'clip'}",
        f"model.language.path={run / 'language'}",
        *(f"stages.{stage}.data.sources.0.path={run / 'shards' / stage}" for stage in ("align", "lora")),
        *sizes.overrides,
    )


def training_script() -> str:
    """The file that the deepspeed launcher starts, wherever this is installed."""
    spec = find_spec("trainer.main")
    assert spec is not None
    return str(spec.origin)


def launcher() -> tuple[str, ...]:
    """The beginning of a command that trains on two ranks."""
    return (str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", training_script())


def with_free_port(command: Sequence[str]) -> tuple[str, ...]:
    """A command whose ranks meet where nothing listens now: every run that deepspeed starts has 29500 by default."""
    for place, word in enumerate(command, start=1):
        if Path(word).name == "deepspeed":
            return (*command[:place], "--master_port", str(choose_port()), *command[place:])
    return tuple(command)


def _training(run: Path, sizes: QuickstartSizes, seed: int) -> tuple[Step, ...]:
    arguments = recipe_arguments(run, sizes, seed)
    before = run / "merged" / "before"
    untrained = (arguments[0], "--untrained", "--stage", "align", "--out", before, *arguments[1:])
    return (
        Step("merge before", _python("tools.merge", *untrained), (before,), ("clip", "language")),
        *(
            Step(
                stage,
                (*launcher(), *arguments, "--stage", stage),
                (run / stage / "finished.json",),
                needs,
                cores=2,
                owns=(run / stage,),
            )
            for stage, needs in (("align", ("clip", "language", "shards align")), ("lora", ("align", "shards lora")))
        ),
    )


def bundles(run: Path, *options: object) -> tuple[Step, ...]:
    """Merge what both stages learnt, and quantize the last of them to NF4 with these options."""
    merges = tuple(
        Step(
            f"merge {stage}",
            _python("tools.merge", run, "--stage", stage, "--out", run / "merged" / stage),
            (run / "merged" / stage,),
            (stage,),
        )
        for stage in ("align", "lora")
    )
    quantize = _python("tools.quantize", run / "merged" / "lora", "--to", "nf4", "--out", run / "bundle", *options)
    return (*merges, Step("quantize", quantize, (run / "bundle",), ("merge lora",)))


def models(run: Path) -> dict[str, Path]:
    """The four models that are scored, by their names in the report."""
    merged = run / "merged"
    return {"before": merged / "before", "align": merged / "align", "lora": merged / "lora", "nf4": run / "bundle"}


def _scores(run: Path) -> tuple[Step, ...]:
    needs = {"before": "merge before", "align": "merge align", "lora": "merge lora", "nf4": "quantize"}
    return tuple(
        Step(
            f"score {name}",
            _python("eval.run", model, "--suite", run / "suite.yaml", "--out", run / "eval" / f"{name}.json"),
            (run / "eval" / f"{name}.json",),
            (needs[name],),
        )
        for name, model in models(run).items()
    )


def _report(run: Path) -> Step:
    needs = tuple(f"score {name}" for name in models(run))
    return Step("report", _python("tools.report", run), (run / "report.json", run / "report.html"), needs)


def suite(run: Path, sizes: QuickstartSizes) -> str:
    """The evaluations of one model, as eval.run's suite: questions and captions, with right and exchanged images."""
    held_out = run / "world" / "held_out"
    questions = (
        f"kind: vqa, questions: {held_out / 'questions.json'}, annotations: {held_out / 'annotations.json'}, "
        f"images: {held_out / 'images'}, limit: {sizes.num_scored}"
    )
    captions = (
        f"kind: caption, captions: {held_out / 'captions.json'}, images: {held_out / 'images'}, "
        f"prompt: {CAPTION_PROMPT}, meteor: false, limit: {sizes.num_scored // 2}"
    )
    tasks = [
        f"{{{task}, shuffle_pictures: {shuffled}}}" for task in (questions, captions) for shuffled in ("false", "true")
    ]
    return "".join(f"- {task}\n" for task in tasks)
