"""The log: the truth of a run, without a step twice; loggers beside it."""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.batch import collate
from tests.support.shards import text_spec, tiny_tokenizer
from trainer.config.schema import TrackingConfig, WandbConfig
from trainer.tracking.diagnostics import layer_histograms
from trainer.tracking.tracker import ProgressLine, Tracker, cut_back, memory_metrics, num_positions
from trainer.validation.answers_page import Answered
from trainer.validation.held_out import Example

METRICS = {"loss": 1.5, "learning_rate": 1e-3, "samples_per_s": 10.0, "tokens_per_s": 1000.0}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tracker(folder: Path, resumed_at: int, config: TrackingConfig | None = None) -> Tracker:
    return Tracker.open(folder, config or TrackingConfig(), title="t", recipe={}, resumed_at=resumed_at)


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


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format behind a header of seven bytes, which is what wandb writes."""
    place, record, block = 7, b"", 32768
    while place + 7 < len(content):
        if block - place % block < 7:
            place += block - place % block
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_steps(folder: Path) -> tuple[set[str], list[int]]:
    """Run ids and the steps of every record in the offline files of all sessions, as `wandb sync` would send them."""
    from wandb.proto import wandb_internal_pb2

    ids, found = set(), []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                found.append(record.history.step.num)
    return ids, found


@pytest.mark.slow
def test_every_logger_shows_each_step_of_a_killed_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TrackingConfig(tensorboard=True, wandb=WandbConfig(project="p", mode="offline"))
    answers = [Answered(Example("k", Image.new("RGB", (32, 20), "red"), "What?", "Red."), "A red <thing>.")]
    histograms = layer_histograms([("projector.linear.weight", torch.linspace(-1, 1, 64))])
    for resumed_at, steps_done in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        opened = tracker(tmp_path, resumed_at, config)
        for step in steps_done:
            opened.log(step, {"loss": step + 10.0 * resumed_at})
        opened.log_validation(steps_done[1], {"validation/loss": 2.5}, answers)
        opened.log_histograms(steps_done[1], histograms)
        opened.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    kept = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert kept == [{"step": 3, "validation/loss": 2.5}]
    wandb.teardown()  # its service writes the end of a file after `finish` has returned; this waits for it
    ids, logged = wandb_steps(tmp_path)
    assert len(ids) == 1
    assert sorted(logged) == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 12), (3, 13), (4, 14)]
    assert [event.step for event in events.Images("validation/answers")] == [3]
    assert [event.step for event in events.Histograms("projector.linear")] == [3]


def test_a_start_from_the_beginning_clears_what_an_earlier_one_left(tmp_path: Path) -> None:
    """Killed before its first checkpoint: the second start begins at step 0, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, num_steps in enumerate((3, 2)):
        opened = tracker(tmp_path, 0, TrackingConfig(tensorboard=True))
        for step in range(1, num_steps + 1):
            opened.log(step, {"loss": step + 10.0 * start})
        opened.log_validation(num_steps, {"validation/loss": float(start)})
        opened.log_histograms(num_steps, layer_histograms([("projector.linear.weight", torch.linspace(-1, 1, 64))]))
        opened.close()
    for name, expected in {"metrics.jsonl": [1, 2], "validation.jsonl": [2], "insight/histograms.jsonl": [2]}.items():
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 11), (2, 12)]
    assert [event.step for event in events.Scalars("validation/loss")] == [2]
    assert [event.step for event in events.Histograms("projector.linear")] == [2]


def test_a_logger_that_fails_in_any_way_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("its service died")

    opened = Tracker(tmp_path, [Broken()])  # type: ignore[list-item]
    opened.log(1, METRICS)
    opened.log(2, METRICS)
    opened.close()
    assert steps(tmp_path) == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "Broken: its service died; the JSONL files are complete"
    ]


def test_memory_is_this_process_s() -> None:
    before = memory_metrics(torch.device("cpu"))["memory/rss_gb"]
    with mmap.mmap(-1, 50_000_000) as held:  # pages of its own: an allocator may have some left
        held.write(bytes(len(held)))
        after = memory_metrics(torch.device("cpu"))["memory/rss_gb"]
    assert 0.03 < after - before < 0.2


def test_padding_is_counted(tmp_path: Path) -> None:
    batch = collate([(), ()], text_spec(tiny_tokenizer()))
    assert num_positions([batch, batch]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo terminal")
def test_on_a_terminal_one_line_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = os.openpty()
    monkeypatch.setenv("COLUMNS", "60")
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        line = ProgressLine("toy/align")
        line.show(10, 0.25, METRICS)
        line.show(20, 0.5, METRICS)
    shown = ""
    with suppress(OSError):  # EIO: all is read, and the other side is closed
        while True:  # one read may give a part of it
            shown += os.read(leader, 4096).decode()
    os.close(leader)
    assert "\n" not in shown
    assert shown.count("\r\x1b[K") == 2
    assert all(len(text) < 60 for text in shown.split("\r\x1b[K"))


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
