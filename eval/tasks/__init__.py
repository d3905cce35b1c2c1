"""One file per benchmark, and the table that maps a configuration value to its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eval.tasks.caption import CaptionTask
from eval.tasks.config import CaptionConfig, ImageGainConfig, TaskConfig, VqaConfig
from eval.tasks.image_gain import ImageGainTask
from eval.tasks.result import Task
from eval.tasks.vqa import VqaTask

TASKS: dict[type, Callable[[Any], Task]] = {
    VqaConfig: VqaTask,
    CaptionConfig: CaptionTask,
    ImageGainConfig: ImageGainTask,
}


def make_task(config: TaskConfig) -> Task:
    """Read and check a task's files; raises InputError where one is missing or wrong."""
    return TASKS[type(config)](config)
