"""What `make photos` runs: every step is one command that a user could run, with the steps that it needs.

    packages -> vision, language ---+-> rehearsal: a few steps of both stages, merged and scored --> forecast
    DATA -> split -> shards --------+-> align -> lora (killed once, goes on) -> audit
                                        merged -> NF4 bundle -> scores -> report

Owns the commands; how they are run and remembered is the quickstart's runner.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from models.spec import Config
from tools.examples.photos.packages import LANGUAGE, VISION
from tools.examples.quickstart.steps import Step, bundles, launcher

RECIPE = "recipes/smollm2_dinov2_photos.yaml"
PROMPT = "Describe the picture."
IMAGE_SIZE = 224
"""Pixels; config.json of the tower says 518, which would be 1,369 features of a photo of 300 pixels."""
SCORES = ("few scores", "more scores")
"""The rehearsal's two evaluations, which a line through their seconds makes a forecast of."""
SCORED = ("align", "lora", "nf4")
"""The models that are scored: after each stage, and the bundle."""


class PhotosSizes(Config):
    """Numbers of photos and steps. The defaults are the documented run; tests use far fewer."""

    num_held_out: int = 200
    num_rehearsed: tuple[int, int] = (2, 8)
    """Held-out photos that the rehearsal scores in a short evaluation and in a longer one."""
    rehearsal_steps: int = 4
    overrides: tuple[str, ...] = ()
    """Appended to every training command."""


@dataclass(frozen=True)
class Photos:
    """Where a run is, what it is made from, and what decides its commands."""

    data: Path
    run: Path
    seed: int
    precision: str
    sizes: PhotosSizes

    @property
    def rehearsal(self) -> Path:
        """The run of a few steps that the forecast is measured on."""
        return self.run / "rehearsal"


def models(run: Path) -> dict[str, Path]:
    """The scored models, by their names in the report."""
    return {"align": run / "merged" / "align", "lora": run / "merged" / "lora", "nf4": run / "bundle"}


def rehearsal(photos: Photos) -> tuple[Step, ...]:
    """Everything before the training itself, and a short one of the same commands."""
    return (*_backbones(photos.run), *_data(photos), *_rehearsed(photos))


def plan(photos: Photos) -> tuple[Step, ...]:
    """Every step, each after the steps that it needs; the report is the last."""
    return (
        *rehearsal(photos),
        *_training(photos),
        *bundles(photos.run, *_calibrated(photos)),
        *_scores(photos),
        _report(photos),
    )


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *(str(argument) for argument in arguments))


def _backbones(run: Path) -> tuple[Step, ...]:
    packages = run / "packages"
    vision = (packages / VISION.file_name, run / "vision", "--image-size", IMAGE_SIZE)
    return (
        Step("packages", _python("tools.examples.photos.packages", packages), (packages,)),
        Step("vision", _python("tools.convert", *vision), (run / "vision",), ("packages",)),
        Step(
            "language",
            _python("tools.convert", packages / LANGUAGE.file_name, run / "language"),
            (run / "language",),
            ("packages",),
        ),
    )


def _data(photos: Photos) -> tuple[Step, ...]:
    lists, shards = photos.run / "split", photos.run / "shards"
    drawn = ("--held-out", photos.sizes.num_held_out, "--prompt", PROMPT, "--seed", photos.seed)
    source = ("--captions", lists / "train.json", "--images", photos.data / "images", "--prompt", PROMPT)
    return (
        Step("split", _python("tools.examples.photos.split", photos.data, lists, *drawn), (lists,)),
        Step("shards", _python("tools.shards", "make", shards, *source), (shards,), ("split",)),
    )


def recipe_arguments(photos: Photos, out: Path | None = None) -> tuple[str, ...]:
    """The recipe with overrides for this run's paths, seed and precision; `out` is where it trains, by default here."""
    run = photos.run
    return (
        RECIPE,
        f"run={out or run}",
        f"seed={photos.seed}",
        f"model.vision.path={run / 'vision'}",
        f"model.language.path={run / 'language'}",
        *(f"stages.{stage}.data.sources.0.path={run / 'shards'}" for stage in ("align", "lora")),
        *(f"stages.{stage}.engine.precision={photos.precision}" for stage in ("align", "lora")),
        *photos.sizes.overrides,
    )


def _rehearsed(photos: Photos) -> tuple[Step, ...]:
    """A few steps of both stages, merged and scored on a few photos, in a run of its own."""
    run, sizes = photos.rehearsal, photos.sizes
    short = (
        "tracking.log_every_steps=1",
        *(f"stages.{stage}.duration={{unit: steps, count: {sizes.rehearsal_steps}}}" for stage in ("align", "lora")),
    )
    train = (*launcher(), *recipe_arguments(photos, run), *short, "--stage", "all")
    bundle = run / "bundle"
    return (
        Step(
            "rehearsal",
            train,
            (run / "lora" / "finished.json",),
            ("vision", "language", "shards"),
            cores=2,
            owns=(run,),
        ),
        Step("its bundle", _python("tools.merge", run, "--stage", "lora", "--out", bundle), (bundle,), ("rehearsal",)),
        *(
            Step(
                name,
                _python(
                    "eval.run", bundle, "--suite", suite_file(photos, limit), "--out", run / f"scores_{limit}.json"
                ),
                (run / f"scores_{limit}.json",),
                (need,),
            )
            for name, limit, need in zip(SCORES, sizes.num_rehearsed, ("its bundle", SCORES[0]), strict=True)
        ),
    )


def _training(photos: Photos) -> tuple[Step, ...]:
    run = photos.run
    train = (*launcher(), *recipe_arguments(photos), "--stage")
    killed = _python("tools.examples.photos.killed_once", run / "lora", "--")
    stages = (("align", (), SCORES[1]), ("lora", killed, "align"))
    return (
        *(
            Step(
                stage,
                (*wrapper, *train, stage),
                (run / stage / "finished.json",),
                (need,),
                cores=2,
                owns=(run / stage,),
            )
            for stage, wrapper, need in stages
        ),
        Step("audit", _python("tools.audit", run, "--stage", "lora"), (run / "lora" / "audit.json",), ("lora",)),
    )


def _calibrated(photos: Photos) -> tuple[object, ...]:
    """Options of quantization: so small a language model sees less where plain rounding has moved its weights."""
    return ("--calibrate", "--golden", photos.run / "split" / "golden.json")


def _scores(photos: Photos) -> tuple[Step, ...]:
    needs = {"align": "merge align", "lora": "merge lora", "nf4": "quantize"}
    run = photos.run
    return tuple(
        Step(
            f"score {name}",
            _python("eval.run", model, "--suite", suite_file(photos), "--out", run / "eval" / f"{name}.json"),
            (run / "eval" / f"{name}.json",),
            (needs[name],),
        )
        for name, model in models(run).items()
    )


def _report(photos: Photos) -> Step:
    run = photos.run
    needs = ("audit", *(f"score {name}" for name in SCORED))
    command = _python("tools.examples.photos.report", run, "--seed", photos.seed)
    return Step("report", command, (run / "report.json", run / "report.html"), needs)


def suite_file(photos: Photos, limit: int | None = None) -> Path:
    """Where `suite` is written."""
    return photos.run / ("suite.yaml" if limit is None else f"suite_{limit}.yaml")


def suite(photos: Photos, limit: int | None = None) -> str:
    """The evaluations of one model, as eval.run's suite: image gain, captions of right and of exchanged photos."""
    files = f"captions: {photos.run / 'split' / 'held_out.json'}, images: {photos.data / 'images'}, prompt: {PROMPT}"
    few = "" if limit is None else f", limit: {limit}"
    captions = f"kind: caption, {files}, meteor: false{few}"
    return (
        f"- {{kind: image_gain, data: {{kind: captions, {files}}}{few}}}\n"
        f"- {{{captions}}}\n"
        f"- {{{captions}, shuffle_pictures: true}}\n"
    )
