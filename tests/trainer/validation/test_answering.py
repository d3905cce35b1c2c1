"""What tasks say beside their metrics reaches the page of a validation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eval.tasks.result import TaskResult
from trainer.distributed.context import DistributedContext
from trainer.validation.answering import Answering
from trainer.validation.answers_page import write_answers


def test_a_note_is_kept_by_the_name_of_its_task_and_shown_escaped(tmp_path: Path) -> None:
    measure: Any = SimpleNamespace(micro_rows=1)
    nothing: Any = None
    answering = Answering(measure, nothing, nothing, DistributedContext(), torch.device("cpu"))
    result = TaskResult(
        "image_gain", "gain", {"image_gain": 0.0}, {}, {}, shuffled=False, samples=[], details={"note": "look <here>"}
    )
    task: Any = SimpleNamespace(name="gain", num_samples=1, ask=lambda *_, **__: [1], score=lambda answers: result)
    assert answering._score(task, nothing) == {"validation/gain/image_gain": 0.0}
    assert answering.notes == {"gain": "look <here>"}
    write_answers(tmp_path / "page.html", "title", {}, [], notes=answering.notes)
    assert "<b>gain</b>: look &lt;here&gt;" in (tmp_path / "page.html").read_text()
