"""An evaluation that is killed, divided, begun again or scored again ends in the bytes of the undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from eval.evaluation import Opened, evaluate
from eval.tasks import make_task
from eval.tasks.config import CaptionConfig, ImageGainConfig, QuestionData, TaskConfig, VqaConfig
from eval.tasks.result import Answerer, Task
from eval.workers import Worker
from models.common.errors import InputError
from tests.support.benchmarks import PROMPT, Seer, TinyBenchmark, repeat_questions

NUM_KILLS = 20


class Dying(Seer):
    """Answers some batches, then is killed."""

    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self.left = num_batches

    def answer(self, queries: Sequence[Any], decoding: Any) -> list[str]:
        self._count()
        return super().answer(queries, decoding)

    def loss(self, queries: Sequence[Any], answers: Sequence[str]) -> list[tuple[float, int]]:
        self._count()
        return super().loss(queries, answers)

    def _count(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


def vqa(tiny: TinyBenchmark, **options: object) -> VqaConfig:
    values = {"questions": tiny.questions, "annotations": tiny.annotations, "images": tiny.images, **options}
    return VqaConfig.model_validate(values)


def suite(tiny: TinyBenchmark) -> list[Task]:
    data = QuestionData(questions=tiny.questions, annotations=tiny.annotations, images=tiny.images)
    caption = CaptionConfig(captions=tiny.captions, images=tiny.images, prompt=PROMPT, meteor=False)
    configs: list[TaskConfig] = [vqa(tiny), vqa(tiny, shuffle_pictures=True), caption, ImageGainConfig(data=data)]
    return [make_task(config) for config in configs]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sightline.json").write_text("{}")
    return folder


def opened(predictor: Answerer) -> Opened:
    return Opened(lambda: predictor, lambda _: {"device": "none"})


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that an evaluation leaves, but the facts, which hold the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".facts.json")}


@pytest.mark.parametrize("seed", range(2))
def test_killed_twenty_times_on_any_number_of_workers_it_ends_in_the_same_bytes(
    tiny: TinyBenchmark, model: Path, seed: int
) -> None:
    tasks = suite(tiny)
    whole = tiny.folder / "whole"
    whole.mkdir()
    assert evaluate(opened(Seer()), tasks, whole / "out.json", model=str(model), batch_size=1) is not None
    out, chance = tiny.folder / "killed" / "out.json", random.Random(seed)
    out.parent.mkdir()
    for _ in range(20):
        count = chance.randint(1, 3)
        dying = Dying(chance.randint(0, 1))
        try:
            worker = Worker(chance.randrange(count), count)
            evaluate(opened(dying), tasks, out, model=str(model), batch_size=1, worker=worker)
        except KeyboardInterrupt:
            for part in out.parent.glob("*.part-*"):
                if chance.random() < 0.3:
                    part.write_bytes(part.read_bytes()[: -chance.randint(1, 9)])  # written half
    for rank in chance.sample(range(3), 3):
        worker = Worker(rank, 3)
        evaluate(opened(Seer()), tasks, out, model=str(model), batch_size=1, worker=worker)
    assert contents(out.parent) == contents(whole)


def test_the_last_of_several_workers_scores(tiny: TinyBenchmark, model: Path) -> None:
    out, task = tiny.folder / "out.json", make_task(vqa(tiny))
    seers = [Seer(), Seer()]
    found = [
        evaluate(opened(seers[rank]), [task], out, model=str(model), batch_size=1, worker=Worker(rank, 2))
        for rank in (1, 0)
    ]
    assert found[0] is None
    assert found[1] is not None
    assert [len(seer.batch_sizes) for seer in seers] == [2, 2]
    facts = json.loads((tiny.folder / "out.facts.json").read_text())
    assert facts["asked_by"] == [{"batch_size": 1, "device": "none"}]


@pytest.mark.parametrize("change", ["bundle", "question", "picture", "option"])
def test_answers_to_something_else_are_not_taken_over(tiny: TinyBenchmark, model: Path, change: str) -> None:
    out = tiny.folder / "out.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(opened(Dying(2)), [make_task(vqa(tiny))], out, model=str(model), batch_size=1)
    options = {}
    if change == "bundle":
        (model / "sightline.json").write_text('{"other": 1}')
    elif change == "question":
        tiny.questions.write_text(tiny.questions.read_text().replace("Which", "What"))
    elif change == "picture":
        first, *_, last = sorted(tiny.images.iterdir())
        last.write_bytes(first.read_bytes())
    else:
        options["prompt_suffix"] = "?"
    second_seer = Seer()
    evaluate(opened(second_seer), [make_task(vqa(tiny, **options))], out, model=str(model), batch_size=1)
    assert len(second_seer.batch_sizes) == 4
    assert not list(tiny.folder.glob("*.part-*"))


def test_scoring_otherwise_asks_nothing_and_opens_no_model(tiny: TinyBenchmark, model: Path) -> None:
    out = tiny.folder / "out.json"
    first = evaluate(opened(Seer()), suite(tiny), out, model=str(model), batch_size=2)

    def refuse() -> Answerer:
        raise AssertionError("the model was opened")

    tasks = suite(tiny)
    tasks[0] = make_task(vqa(tiny, normalisation="evalai"))
    again = evaluate(Opened(refuse, lambda _: {}), tasks, out, model=str(model), batch_size=2)
    assert first is not None
    assert again is not None
    asked = [[result["asked"] for result in each["results"]] for each in (first, again)]
    protocols = [[result["protocol"] for result in each["results"]] for each in (first, again)]
    assert asked[0] == asked[1]
    assert [one == other for one, other in zip(*protocols, strict=True)] == [False, True, True, True]
    assert again["results"][3] == first["results"][3]


def test_samples_that_are_not_the_results_own_are_asked_again(tiny: TinyBenchmark, model: Path) -> None:
    """As where a kill falls between the samples of a new evaluation and its results."""
    out = tiny.folder / "out.json"
    evaluate(opened(Seer()), [make_task(vqa(tiny))], out, model=str(model), batch_size=2)
    samples = tiny.folder / "out.vqa.jsonl"
    samples.write_text(samples.read_text().replace("lime", "pink"))
    seer = Seer()
    evaluate(opened(seer), [make_task(vqa(tiny))], out, model=str(model), batch_size=2)
    assert len(seer.prompts) == 4
    assert "lime" in samples.read_text()


class Choosy(Seer):
    """Refuses one question, as a model does that cannot read so long a prompt."""

    def answer(self, queries: Sequence[Any], decoding: Any) -> list[str]:
        if any(query.turns[0].text.startswith("Is it") for query in queries):
            raise InputError("the chat takes 9 tokens and the model reads 8: shorten it")
        return super().answer(queries, decoding)


def test_what_cannot_be_asked_is_named_and_counted(tiny: TinyBenchmark, model: Path) -> None:
    out = tiny.folder / "out.json"
    found = evaluate(opened(Choosy()), [make_task(vqa(tiny))], out, model=str(model), batch_size=4)
    assert found is not None
    (result,) = found["results"]
    assert result["num_unasked"] == 1
    assert result["unasked"] == [{"place": 3, "reason": "the chat takes 9 tokens and the model reads 8: shorten it"}]
    assert result["metrics"] == {"vqa_accuracy": 75.0}
    again = evaluate(opened(Choosy()), [make_task(vqa(tiny))], out, model=str(model), batch_size=4)
    assert again == found
    only = make_task(vqa(tiny, limit=1, prompt_suffix="?"))
    with pytest.raises(InputError, match="question 1 cannot be asked"):
        evaluate(opened(Refusing()), [only], out, model=str(model), batch_size=4)


class Refusing(Seer):
    def answer(self, queries: Sequence[Any], decoding: Any) -> list[str]:
        raise InputError("no")


class Stepwise(Seer):
    """Answers a batch for each byte that comes through a pipe, and says before each that it begins; then it waits."""

    def __init__(self, commands: int, begun: int) -> None:
        super().__init__()
        self._commands, self._begun = commands, begun

    def answer(self, queries: Sequence[Any], decoding: Any) -> list[str]:
        os.read(self._commands, 1)
        os.write(self._begun, b".")
        time.sleep(0.005)
        return super().answer(queries, decoding)


def killed_behind(task: Task, out: Path, model: Path, worker: Worker, num_answers: int, delay_s: float) -> bool:
    """Fork a worker, and kill it a moment after it has begun so many batches; False where it ended before."""
    (commands, command), (begun, begin) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(command)
        tqdm.set_lock(threading.RLock())  # its own: whoever is killed while he holds the common one holds it for ever
        try:
            evaluate(opened(Stepwise(commands, begin)), [task], out, model=str(model), batch_size=1, worker=worker)
        finally:
            os._exit(0)
    for end in (commands, begin):
        os.close(end)
    os.write(command, b"." * num_answers)
    num_begun = 0
    while num_begun < num_answers and (content := os.read(begun, 1)):
        num_begun += len(content)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    for end in (command, begun):
        os.close(end)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
def test_real_processes_killed_twenty_times_end_in_the_same_bytes(tiny: TinyBenchmark, model: Path) -> None:
    """Each kill falls around the moment at which an answer is written, on one, two or three workers in any order."""
    repeat_questions(tiny, 60)
    task, chance = make_task(vqa(tiny)), random.Random(7)
    whole, out = tiny.folder / "whole" / "out.json", tiny.folder / "killed" / "out.json"
    whole.parent.mkdir()
    out.parent.mkdir()
    evaluate(opened(Seer()), [task], whole, model=str(model), batch_size=1)  # and the forks find everything imported
    num_killed = 0
    while num_killed < NUM_KILLS:
        assert not out.exists(), "everything was answered before the last kill"
        count = chance.randint(1, 3)
        worker = Worker(chance.randrange(count), count)
        num_killed += killed_behind(task, out, model, worker, chance.randint(1, 6), chance.random() * 0.015)
    for rank in chance.sample(range(3), 3):
        evaluate(opened(Seer()), [task], out, model=str(model), batch_size=1, worker=Worker(rank, 3))
    assert contents(out.parent) == contents(whole.parent)
