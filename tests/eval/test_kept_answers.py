"""Parts of answers on disk: whose batch is whose, what is torn, foreign or doubled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.kept_answers import KeptAnswers, asked_id
from eval.tasks import make_task
from eval.tasks.config import ImageGainConfig, QuestionData
from eval.workers import Worker
from models.common.errors import InputError
from tests.support.benchmarks import Seer, TinyBenchmark


def kept(folder: Path, rank: int = 0, count: int = 1, *, num_samples: int = 10, asked: str = "a" * 64) -> KeptAnswers:
    return KeptAnswers(folder / "out.json", "task", asked, num_samples, Worker(rank, count))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_disjoint_and_complete(tmp_path: Path, count: int) -> None:
    shares = [list(kept(tmp_path, rank, count, num_samples=11).missing(3)) for rank in range(count)]
    places = [place for share in shares for batch in share for place in batch]
    assert sorted(places) == list(range(11))


def test_another_number_of_workers_goes_on_where_others_stopped(tmp_path: Path) -> None:
    for rank in range(3):
        worker = kept(tmp_path, rank, 3)
        first = next(worker.missing(2))
        worker.add(first, [str(place) for place in first])
    alone = kept(tmp_path)
    assert list(alone.missing(2)) == [range(6, 8), range(8, 10)]
    assert list(alone.missing(4)) == [range(6, 8), range(8, 10)]
    assert alone.all() is None
    for places in list(alone.missing(4)):
        alone.add(places, [str(place) for place in places])
    assert alone.all() == [str(place) for place in range(10)]
    alone.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_torn_is_asked_again(tmp_path: Path) -> None:
    one = kept(tmp_path)
    one.add(range(0, 2), ["a", "b"])
    whole = one.path.read_bytes()
    one.path.write_bytes(whole + b'{"start": 2, "ans')
    del one
    again = kept(tmp_path)
    assert next(again.missing(2)) == range(2, 4)
    again.add(range(2, 4), ["c", "d"])
    assert again.read() == {0: "a", 1: "b", 2: "c", 3: "d"}


def test_a_head_that_was_torn_loses_nothing_else(tmp_path: Path) -> None:
    one = kept(tmp_path)
    one.path.write_bytes(b'{"asked": "aa')
    one.add(range(0, 2), ["a", "b"])
    assert one.read() == {0: "a", 1: "b"}


def test_answers_to_other_questions_are_never_read(tmp_path: Path) -> None:
    kept(tmp_path).add(range(0, 2), ["a", "b"])
    other = kept(tmp_path, asked="b" * 64)
    assert other.read() == {}
    same_beginning = kept(tmp_path, asked="a" * 63 + "b")
    assert same_beginning.read() == {}


def test_two_different_answers_to_one_question_are_an_error(tmp_path: Path) -> None:
    kept(tmp_path, 0, 2).add(range(0, 2), ["a", "b"])
    kept(tmp_path, 0, 3).add(range(0, 2), ["a", "b"])
    assert kept(tmp_path).read() == {0: "a", 1: "b"}
    kept(tmp_path, 1, 3).add(range(1, 2), ["c"])
    with pytest.raises(InputError, match="different answers to question 2"):
        kept(tmp_path).read()


def test_two_processes_of_one_rank_are_told(tmp_path: Path) -> None:
    """As where each of eight processes believes that it is alone."""
    one, other = kept(tmp_path), kept(tmp_path)
    one.add(range(0, 2), ["a", "b"])
    with pytest.raises(InputError, match="two workers have rank 0 of 1"):
        other.add(range(2, 4), ["c", "d"])


def test_losses_come_back_from_disk_as_they_were(tiny: TinyBenchmark) -> None:
    data = QuestionData(questions=tiny.questions, annotations=tiny.annotations, images=tiny.images)
    task = make_task(ImageGainConfig(data=data))
    whole = task.run(Seer(), 2)
    answers = kept(tiny.folder, num_samples=task.num_samples)
    for places in list(answers.missing(3)):
        answers.add(places, task.ask(Seer(), 3, places))
    found = answers.all()
    assert found is not None
    result = task.score(found)
    assert result.metrics == whole.metrics
    assert json.loads(json.dumps(task.answers_in(result.samples))) == found


def test_the_id_of_what_was_asked_holds_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "sightline.json").write_text("{}")
    first = asked_id({"prompts": "p"}, tmp_path)
    assert first == asked_id({"prompts": "p"}, tmp_path) != asked_id({"prompts": "q"}, tmp_path)
    (tmp_path / "sightline.json").write_text('{"other": 1}')
    assert first != asked_id({"prompts": "p"}, tmp_path)
