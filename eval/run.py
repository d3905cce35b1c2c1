"""Measure a bundle: `python -m eval.run MODEL_DIR --task vqa ... --out OUT.json`, or several tasks by `--suite`.

Owns: the command line. Every file is read and checked before the model is opened. What is measured lies in
`eval.tasks`, what is written in `eval.results`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError, run_cli

if TYPE_CHECKING:
    from eval.tasks.config import TaskConfig
    from eval.tasks.result import Answerer, Task

_DATA_OPTIONS = ("captions", "questions", "annotations", "images", "prompt", "prompt_suffix")
_TASK_OPTIONS = (*_DATA_OPTIONS, "normalisation", "max_new_tokens", "shuffle_pictures", "meteor", "limit", "seed")

_COMPLAINTS = {"extra_forbidden": "this task has no such option", "missing": "is needed"}

_EPILOG = """\
tasks:
  vqa         --questions Q.json --annotations A.json --images DIR [--prompt-suffix TEXT] [--normalisation evalai]
  caption     --captions C.json --images DIR --prompt TEXT [--no-meteor]
  image_gain  either of these two kinds of files: loss with exchanged pictures minus loss with the right ones

--suite is a YAML list of such tasks, all measured in one process:
  - {kind: vqa, questions: q.json, annotations: a.json, images: photos}
  - {kind: vqa, questions: q.json, annotations: a.json, images: photos, shuffle_pictures: true}
  - {kind: image_gain, data: {kind: captions, captions: c.json, images: photos, prompt: Describe it.}}
"""


def main(argv: list[str]) -> int:
    """Check the tasks, open the model, measure, write, and print the table."""
    arguments = _parser().parse_args(argv)
    if not Path(arguments.model).is_dir():
        raise InputError(f"{arguments.model}: no such folder; give a bundle that tools.merge or tools.quantize made")
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: at least 1 is needed")
    from eval.results import check_out, table

    check_out(arguments.out)
    tasks = prepare(suite_configs(arguments.suite) if arguments.suite else [_single_config(arguments)])

    from eval.predictor import Predictor

    predictor = Predictor.open(arguments.model, device=arguments.device)
    evaluation = evaluate(predictor, tasks, arguments.out, model=arguments.model, batch_size=arguments.batch_size)
    print(table(evaluation["results"]))
    print(f"written to {arguments.out}")
    return 0


def prepare(configs: Sequence[TaskConfig]) -> list[Task]:
    """Read and check every task's files; their names must differ, because files are called after them."""
    from eval.tasks import make_task

    tasks = [make_task(config) for config in configs]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two tasks of the suite are called {twice[0]!r}: give one a `name`")
    return tasks


def evaluate(predictor: Answerer, tasks: Sequence[Task], out: Path, *, model: str, batch_size: int) -> dict[str, Any]:
    """Run `tasks` on one open model and write OUT.json and the samples; returns what OUT.json holds."""
    from eval.results import write_results, write_samples

    started_s = time.perf_counter()
    results = []
    for task in tasks:
        task_started_s = time.perf_counter()
        result = task.run(predictor, batch_size)
        path = write_samples(out, task.name, result.samples)
        seconds = round(time.perf_counter() - task_started_s, 3)
        config = task.config.model_dump(mode="json")
        results.append({**result.as_dict(), "samples": path.name, "seconds": seconds, "config": config})
    seconds = round(time.perf_counter() - started_s, 3)
    evaluation: dict[str, Any] = {"model": model, "seconds": seconds, "results": results}
    write_results(out, evaluation)
    return evaluation


def suite_configs(path: Path) -> list[TaskConfig]:
    """The tasks of a suite, a YAML list of tagged values.

    Raises:
        InputError: no such file, not a list, or a task with a key that is unknown, missing or of the wrong kind.
    """
    import yaml

    try:
        tasks = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such suite") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tasks, list) or not tasks:
        raise InputError(f"{path}: a suite is a YAML list of tasks, each with a `kind`")
    return [_config(f"{path}, task {number}", task) for number, task in enumerate(tasks, start=1)]


def _config(where: str, values: Any) -> TaskConfig:
    """Decode one task; pydantic's complaints become one line."""
    from pydantic import TypeAdapter, ValidationError

    from eval.tasks.config import TaskConfig

    adapter: TypeAdapter[TaskConfig] = TypeAdapter(TaskConfig)
    try:
        return adapter.validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        complaints = [_complaint(each["loc"], each["type"], each["msg"]) for each in error.errors()]
        raise InputError(f"{where}: {'; '.join(complaints)}") from None


def _complaint(place: tuple[int | str, ...], kind: str, message: str) -> str:
    """One of pydantic's errors; the first part of its place is the task's kind."""
    key = ".".join(str(part) for part in place[1:]) or "task"
    return f"{key}: {_COMPLAINTS.get(kind, message)}"


def _single_config(arguments: argparse.Namespace) -> TaskConfig:
    """One task from the command line; an option that the task doesn't have is an error."""
    if arguments.task is None:
        raise InputError("give --task with its files, or --suite")
    given = {name: getattr(arguments, name) for name in _TASK_OPTIONS if getattr(arguments, name) is not None}
    if arguments.task == "image_gain":
        data = {name: given.pop(name) for name in _DATA_OPTIONS if name in given}
        given["data"] = {"kind": "captions" if "captions" in data else "questions", **data}
    return _config(f"--task {arguments.task}", {"kind": arguments.task, **given})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description="Measure a bundle.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="the bundle's folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--task", choices=["vqa", "caption", "image_gain"])
    what.add_argument("--suite", type=Path, help="a YAML list of tasks")
    add("--questions", type=Path, help="VQA v2's questions file (.json or .json.gz)")
    add("--annotations", type=Path, help="VQA v2's annotations file")
    add("--captions", type=Path, help="COCO captions, or a list of {file_name, caption}")
    add("--images", type=Path, help="the folder of pictures")
    add("--prompt", help="what every picture is asked (captions)")
    add("--prompt-suffix", help="put after every question")
    add("--normalisation", choices=["official", "evalai"], help="of VQA answers; default official")
    add("--max-new-tokens", type=int)
    add("--shuffle-pictures", action="store_true", default=None, help="show each sample another one's picture")
    add("--no-meteor", dest="meteor", action="store_false", default=None, help="leave METEOR out (10 s)")
    add("--limit", type=int, help="measure only the first samples")
    add("--seed", type=int, help="of exchanged pictures and intervals; default 0")
    add("--batch-size", type=int, default=32)
    add("--device", default="auto", help="auto, cpu or cuda:N")
    add("--out", type=Path, required=True, help="the JSON file to write")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
