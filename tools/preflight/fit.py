"""Whether a stage fits: the memory of a GPU at the peak of a step, and the disk that its checkpoints take.

Owns the judgement, and what is printed. The bytes are computed by `tools.preflight.memory`.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

from models.common.files import write_json
from models.shapes import ModelShape
from tools.preflight.data import Lengths, row_counts
from tools.preflight.geometry import PartCount
from tools.preflight.machine import Machine
from tools.preflight.memory import estimate, read_settings, storage
from tools.preflight.report import Report, gigabytes
from tools.preflight.wire import Traffic, traffic
from trainer.config.recipe import Recipe
from trainer.out_of_memory import preflight_file

CHECKPOINT_BYTES = 12
"""For each trained parameter: the weight and two moments in fp32."""


class StageFit:
    """Memory and disk of one stage on a machine; findings go into the report."""

    def __init__(self, recipe: Recipe, name: str, machine: Machine, report: Report) -> None:
        self._recipe, self._name, self._machine, self._report = recipe, name, machine, report
        self._stage = recipe.stage(name)

    def check_memory(self, shape: ModelShape, counts: dict[str, PartCount], lengths: Lengths) -> None:
        """Print memory with nothing and everything recomputed, and check whether the recipe fits, or what would."""
        engine = self._stage.engine
        num_layers = shape.language.num_layers if self._stage.objective.reader == "language" else 0
        asked = num_layers if engine.activation_checkpointing is True else int(engine.activation_checkpointing)
        rows_at_once = self._stage.batch.rows_at_once(self._machine.num_gpus)
        batch = row_counts(self._stage, lengths, worst=True).times(rows_at_once)
        run = partial(
            estimate,
            shape,
            counts,
            self._stage,
            batch,
            load=self._recipe.model.language.frozen_format,
            num_gpus=self._machine.num_gpus,
            settings=read_settings(engine.zero),
        )
        totals = [run(num_recomputed=layers).total for layers in range(num_layers + 1)]
        none, every = run(num_recomputed=0), run(num_recomputed=num_layers)
        self._report.fact(f"memory of a GPU, micro-batch of {batch.tokens:,.0f} tokens ({lengths.source}), computed:")
        columns = {"keep all": none, "recompute all": every} if num_layers else {"": none}
        rows = [("", *columns)]
        rows += [(part, *(gigabytes(each.parts[part]) for each in columns.values())) for part in none.parts]
        self._report.table([*rows, ("together", *(gigabytes(each.total) for each in columns.values()))])
        self._keep_memory(totals, asked)
        self._judge_memory(totals, asked)

    def _keep_memory(self, totals: list[float], asked: int) -> None:
        """Leave the bytes where a run that runs out of memory looks for them (`trainer.out_of_memory`)."""
        file = preflight_file(Path(self._recipe.run), self._name)
        with suppress(OSError):  # it may not be this user's
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                file,
                {
                    "zero": self._stage.engine.zero,
                    "micro_rows": self._stage.batch.rows_at_once(self._machine.num_gpus),
                    "num_gpus": self._machine.num_gpus,
                    "gpu_bytes": self._machine.gpu_bytes,
                    "num_recomputed": min(asked, len(totals) - 1),
                    "bytes_by_recomputed": totals,
                },
            )

    def _judge_memory(self, totals: list[float], asked: int) -> None:
        """`totals` are bytes by the number of recomputed layers."""
        has = self._machine.gpu_bytes
        stage, asked = f"stages.{self._name}", min(asked, len(totals) - 1)
        fitting = next((layers for layers, total in enumerate(totals) if total <= has), None)
        if fitting is None:
            self._report.fault(
                f"{self._name}: {gigabytes(min(totals))} at least, a GPU has {gigabytes(has)}: lower"
                f" {stage}.batch.micro_rows, or quantize the frozen language model (model.language.load)"
            )
            return
        if len(totals) == 1:
            return
        advice = "false" if fitting == 0 else str(fitting)
        self._report.fact(
            f"recommended: activation_checkpointing: {advice} (of {len(totals) - 1} layers; the recipe has {asked})"
        )
        if totals[asked] > has:
            self._report.fault(
                f"{self._name}: {gigabytes(totals[asked])}, a GPU has {gigabytes(has)}:"
                f" set {stage}.engine.activation_checkpointing={advice}, or lower {stage}.batch.micro_rows"
            )

    def step_traffic(self, counts: dict[str, PartCount]) -> Traffic:
        """Bytes that a GPU moves in one optimizer step."""
        trained = sum(part.trained for part in counts.values())
        settings = read_settings(self._stage.engine.zero)
        stored = storage(self._stage, settings, trained, self._machine.num_gpus)
        return traffic(counts, self._stage, stored, load=self._recipe.model.language.frozen_format)

    def check_disk(self, counts: dict[str, PartCount]) -> None:
        """Compare the size of the kept checkpoints, the best and one being written, with the free disk space."""
        one = CHECKPOINT_BYTES * sum(part.trained for part in counts.values())
        kept = self._stage.checkpoint.keep + 1 + (self._stage.validation is not None)
        place = Path(self._recipe.run).resolve()
        while not place.is_dir():
            place = place.parent
        free = shutil.disk_usage(place).free
        self._report.fact(f"a checkpoint has {gigabytes(one)}, {kept} at once; {gigabytes(free)} are free at {place}")
        if one * kept > free:
            self._report.fault(
                f"{self._name}: {kept} checkpoints of {gigabytes(one)} do not fit into {gigabytes(free)} at {place}:"
                f" free some space, set another `run`, or lower stages.{self._name}.checkpoint.keep"
            )
