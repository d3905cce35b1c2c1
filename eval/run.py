"""Measure a bundle: `python -m eval.run MODEL_DIR --task vqa ... --out OUT.json`, or several tasks by `--suite`.

Owns: the command line. Every file is read and checked before the model is opened. What is measured is in `eval.tasks`,
    the output files are in `eval.results`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from models.common.errors import InputError, run_cli, single_line

if TYPE_CHECKING:
    from eval.evaluation import Opened
    from eval.tasks.config import TaskConfig
    from eval.tasks.result import Answerer, Task
    from eval.workers import Worker

_DATA_OPTIONS = ("captions", "questions", "annotations", "images", "prompt", "prompt_suffix")
_TASK_OPTIONS = (
    *_DATA_OPTIONS,
    *("benchmark", "parse", "normalisation", "max_new_tokens", "shuffle_pictures", "meteor", "limit", "seed"),
)

_COMPLAINTS = {"extra_forbidden": "this task has no such option", "missing": "is needed"}

_EPILOG = """\
tasks:
  vqa         --questions Q.json --annotations A.json --images DIR [--prompt-suffix TEXT] [--normalisation evalai]
  yes_no      --questions POPE.json --images DIR   (a label each; or VQA v2's two files)
  caption     --captions C.json --images DIR --prompt TEXT [--no-meteor]
  benchmark   --benchmark NAME --questions FILE ... [--annotations A.json] [--images DIR]
  retrieval   --captions C.json --images DIR   (of a dual encoder such as CLIP)
  image_gain  either of these two kinds of files: loss with exchanged images minus loss with the right ones

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
    from eval.evaluation import evaluate
    from eval.results import check_out, table, write_lmms_eval
    from eval.workers import Worker

    check_out(arguments.out)
    tasks = prepare(suite_configs(arguments.suite) if arguments.suite else [_single_config(arguments)])

    worker = Worker.of(os.environ)
    opened = open_bundle(arguments.model, arguments.device, worker)
    evaluation = evaluate(
        opened, tasks, arguments.out, model=arguments.model, batch_size=arguments.batch_size, worker=worker
    )
    if evaluation is None:
        print(f"worker {worker.rank} of {worker.count} has asked its share; {arguments.out} is written by the last one")
        return 0
    if arguments.lmms_eval is not None:
        write_lmms_eval(arguments.lmms_eval, evaluation, arguments.out)
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


def open_bundle(path: str, device: str, worker: Worker) -> Opened:
    """The bundle at `path`, opened when it is first asked: a worker under torchrun or srun takes its own GPU."""
    from eval.evaluation import Opened

    def open_model() -> Answerer:
        import torch

        from eval.dual_encoder import DualEncoder, is_dual_encoder
        from eval.predictor import Predictor

        place = worker.device(device, torch.cuda.device_count())
        if is_dual_encoder(Path(path)):
            return cast("Answerer", DualEncoder.open(Path(path), place))
        return Predictor.open(path, device=place)

    return Opened(open_model, facts_of)


def facts_of(model: Any) -> dict[str, Any]:
    """What moves numbers although it is no part of the protocol: device, dtype, attention, versions."""
    import platform

    import torch
    import transformers

    on_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else platform.machine(),
        "dtype": str(next(each.dtype for each in model.model.parameters() if each.is_floating_point())),
        "attention": getattr(model.model.config, "_attn_implementation", None),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


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
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not YAML: {single_line(error)}") from None
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
    if arguments.task != "benchmark" and "questions" in given:
        if len(given["questions"]) > 1:
            raise InputError(f"--task {arguments.task} has one file of questions; {len(given['questions'])} are given")
        given["questions"] = given["questions"][0]
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
    what.add_argument("--task", choices=["vqa", "yes_no", "caption", "benchmark", "image_gain", "retrieval"])
    what.add_argument("--suite", type=Path, help="a YAML list of tasks")
    add("--benchmark", help="a published benchmark (docs/evaluation.md has the table)")
    add("--parse", help="another parser than the benchmark's, such as box.thousand")
    add("--questions", nargs="+", help="VQA v2's or POPE's questions file (.json or .json.gz), or a benchmark's files")
    add("--annotations", type=Path, help="VQA v2's annotations file")
    add("--captions", type=Path, help="COCO captions, or a list of {file_name, caption}")
    add("--images", type=Path, help="the folder of images")
    add("--prompt", help="what every image is asked (captions)")
    add("--prompt-suffix", help="put after every question")
    add("--normalisation", choices=["official", "evalai"], help="of VQA answers; default official")
    add("--max-new-tokens", type=int)
    add("--shuffle-pictures", action="store_true", default=None, help="show each sample another one's image")
    add("--no-meteor", dest="meteor", action="store_false", default=None, help="leave METEOR out (10 s)")
    add("--limit", type=int, help="measure only the first samples")
    add("--seed", type=int, help="of exchanged images and intervals; default 0")
    add("--batch-size", type=int, default=32)
    add("--device", default="auto", help="auto, cpu or cuda:N")
    add("--out", type=Path, required=True, help="the JSON file to write")
    add("--lmms-eval", type=Path, metavar="FOLDER", help="also write results and samples as lmms-eval does")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
