"""The log: the truth of a run, without a step twice; sinks beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config import TrackingConfig, WandbConfig
from trainer.tracking import ProgressLine, Tracker, cut_back

METRICS = {"loss": 1.5, "learning_rate": 1e-3, "samples_per_s": 10.0, "tokens_per_s": 1000.0}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tracker(folder: Path, resumed_at: int, config: TrackingConfig | None = None) -> Tracker:
    return Tracker(folder, config or TrackingConfig(), title="t", recipe={}, resumed_at=resumed_at)


def test_a_resumed_log_has_no_step_twice(tmp_path: Path) -> None:
    first = tracker(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.log(step, METRICS)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')  # killed in mid-line
    second = tracker(tmp_path, 2)
    for step in (3, 4, 5):
        second.log(step, METRICS)
    second.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_cutting_back_a_log_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_tensorboard_and_offline_wandb_get_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TrackingConfig(tensorboard=True, wandb=WandbConfig(project="p", mode="offline"))
    opened = tracker(tmp_path, 0, config)
    opened.log(1, METRICS)
    opened.log(2, METRICS)
    opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.value for event in events.Scalars("loss")] == [1.5, 1.5]
    assert (tmp_path / "wandb_id").read_text()
    assert list(tmp_path.rglob("*.wandb"))


def test_the_progress_line_says_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("toy/align")
    line.show(10, 0.25, METRICS)
    line.show(20, 0.5, METRICS)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2
    for words in (
        "toy/align",
        "step 20",
        "50.0 %",
        "loss 1.5000",
        "lr 1.00e-03",
        "10.0 samples/s",
        "1,000 tokens/s",
        "left",
    ):
        assert words in shown[-1]
