"""A published benchmark of `eval.benchmarks`, asked as its protocol says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.benchmarks.asking import pictures_of, prompt_of, with_sizes
from eval.benchmarks.rows import Rows, read_rows
from eval.benchmarks.scoring import asked_facts, score_answers
from eval.benchmarks.spec import load
from eval.images import Shown, check_images, shuffle_images
from eval.result import TaskResult
from eval.tasks.asked import AskedTask
from eval.tasks.config import BenchmarkConfig
from models.common.errors import InputError


class BenchmarkTask(AskedTask):
    """Reads and checks the benchmark's files at once; raises InputError where one, or a picture, is missing."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        found = load(config.benchmark)
        if config.parse is not None:
            found = found.model_copy(update={"form": found.form.with_parser(config.parse)})
        self._benchmark = found
        self._max_new_tokens = config.max_new_tokens or found.max_new_tokens
        self.name = config.name or (f"{config.benchmark}_shuffled" if config.shuffle_pictures else config.benchmark)
        self._rows = _first(read_rows(found, config.questions, config.annotations), config.limit)
        blank = next((row for row in self._rows.rows if not prompt_of(found, row).strip()), None)
        if blank is not None:
            raise InputError(f"{' and '.join(config.questions)}: question {blank.name} is empty")
        pictures = pictures_of(self._rows.rows, config.images)
        check_images(pictures)
        self._rows = replace(self._rows, rows=with_sizes(found, self._rows.rows, pictures))
        self._shown = shuffle_images(pictures, config.seed) if config.shuffle_pictures else pictures

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See `Task`: the headline first; none where a judge has to say what is right."""
        return () if self._benchmark.is_judged else self._benchmark.metric_names

    def prompt_of(self, place: int) -> str:
        """The question in the benchmark's form."""
        return prompt_of(self._benchmark, self._rows.rows[place])

    def score(self, answers: Sequence[str]) -> TaskResult:
        """The benchmark's figures, from an answer to every question."""
        config = self.config
        return score_answers(
            config.benchmark,
            self._benchmark,
            self._rows,
            answers,
            asked=asked_facts(self._benchmark, self._max_new_tokens),
            result_name=self.name,
            shuffled=config.shuffle_pictures,
            seed=config.seed,
            is_published=not (config.limit or config.parse or config.max_new_tokens or config.shuffle_pictures),
            shown=[_name(picture) for picture in self._shown],
        )


def _first(rows: Rows, limit: int | None) -> Rows:
    return Rows(rows.rows[:limit], rows.digests, rows.num_repeated)


def _name(picture: Shown) -> str | None:
    if picture is None:
        return None
    return str(picture) if isinstance(picture, Path) else picture.name
