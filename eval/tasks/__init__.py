"""One file per benchmark, and the table that maps a configuration value to its task.

A recipe names tasks, so importing this loads no scorer: a task's file is imported when it is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from eval.tasks.config import (
    BenchmarkConfig,
    CaptionConfig,
    ImageGainConfig,
    RetrievalConfig,
    TaskConfig,
    VqaConfig,
    YesNoConfig,
)

if TYPE_CHECKING:
    from eval.tasks.result import Task

TASKS: dict[type, tuple[str, str]] = {
    VqaConfig: ("eval.tasks.vqa", "VqaTask"),
    YesNoConfig: ("eval.tasks.yes_no", "YesNoTask"),
    CaptionConfig: ("eval.tasks.caption", "CaptionTask"),
    ImageGainConfig: ("eval.tasks.image_gain", "ImageGainTask"),
    BenchmarkConfig: ("eval.tasks.benchmark", "BenchmarkTask"),
    RetrievalConfig: ("eval.tasks.retrieval", "RetrievalTask"),
}


def make_task(config: TaskConfig) -> Task:
    """Read and check a task's files; raises InputError where one is missing or wrong."""
    module, name = TASKS[type(config)]
    task: Task = getattr(import_module(module), name)(config)
    return task
