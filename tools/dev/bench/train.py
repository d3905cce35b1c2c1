"""A whole training step beside the ordinary one, by the processor's time: `make bench-train`.

    align  the projector learns                      fp32, bf16, and both with the tower's features kept on disk
    lora   projector and adapters of rank 32 learn   fp32, bf16

Ours is the trainer's own step (`trainer.step`) over its engine: collating, forward, backward, guard, AdamW under
ZeRO-2. The peer is `ordinary`: a plain loop on a CPU, transformers' Trainer on a GPU. Both begin with the same weights
and take the same samples, in turns. Weights are random, in the shapes of DINOv2-small and SmolLM2-135M, unless
directories are given; reading and decoding pictures is in neither.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import run_cli

if TYPE_CHECKING:
    import torch

    from data_pipeline.sample import Encoded
    from tools.dev.bench.measure import Row
    from trainer.config.tuning import TuningPlan

PACKAGES = ["torch", "transformers", "peft", "deepspeed"]
FACTOR = 2
"""Of pixel shuffle: 256 features become 64 image tokens."""
FEATURE_LAYER = -3

DINOV2_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 224,
    "patch_size": 14,
}
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY = (
    {**DINOV2_SMALL, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56},
    {
        **SMOLLM2_135M,
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
)
"""The same architectures, small enough for tests."""


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    tuned: str
    precision: str
    is_kept: bool = False

    @property
    def title(self) -> str:
        """The line's name."""
        return f"{self.tuned} {self.precision}{', features kept' if self.is_kept else ''}"

    @property
    def plan(self) -> TuningPlan:
        """What learns."""
        from trainer.config.tuning import Full, Lora, TuningPlan

        projector = Full(learning_rate=1e-3)
        if self.tuned == "align":
            return TuningPlan(projector=projector)
        return TuningPlan(projector=projector, language=Lora(learning_rate=5e-4, rank=32, alpha=64.0, dropout=0.05))


CELLS = (
    Cell("align", "fp32"),
    Cell("align", "bf16"),
    Cell("align", "fp32", is_kept=True),
    Cell("align", "bf16", is_kept=True),
    Cell("lora", "fp32"),
    Cell("lora", "bf16"),
)


def main(argv: list[str]) -> int:
    """Measure every cell, print the table and write runs/bench/train.json."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.train", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--vision", type=Path, help="a directory of a DINOv2; by default its shape, drawn")
    parser.add_argument("--language", type=Path, help="a directory of a Llama; by default SmolLM2's shape, drawn")
    parser.add_argument("--rows", type=int, default=16, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=3, help="each is two steps of ours and two of the peer's")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--only", nargs="+", default=[], metavar="TITLE", help="begin of a title: 'align bf16'")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the command out")
    arguments = parser.parse_args(argv)
    import torch

    from tools.dev.bench.measure import report

    torch.set_num_threads(arguments.threads)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    only = tuple(arguments.only)
    cells = [cell for cell in CELLS if not only or cell.title.startswith(only)]
    rows = []
    for number, cell in enumerate(cells, start=1):
        began_s = time.monotonic()
        parts = Parts(arguments.vision, arguments.language, arguments.tiny)
        rows.append(contest(cell, parts, arguments.rows, arguments.rounds, device))
        print(
            f"{number}/{len(cells)} {cell.title}: {rows[-1].ratio:.2f}, {time.monotonic() - began_s:.0f} s", flush=True
        )
    report("train", rows)
    return 0


@dataclass(frozen=True)
class Parts:
    """The three parts, drawn or read anew with the same weights each time."""

    vision_directory: Path | None
    language_directory: Path | None
    is_tiny: bool

    def make(self, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        """Vision tower and language model in `dtype`, projector in fp32."""
        import torch
        from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

        from models.projectors.pixel_shuffle import PixelShuffleProjector

        torch.manual_seed(0)
        vision_shape, language_shape = TINY if self.is_tiny else (DINOV2_SMALL, SMOLLM2_135M)
        if self.vision_directory is None:
            vision = Dinov2Model(Dinov2Config(**vision_shape)).to(dtype)
        else:
            vision = Dinov2Model.from_pretrained(self.vision_directory, dtype=dtype, trust_remote_code=False)
        if self.language_directory is None:
            language = LlamaForCausalLM(LlamaConfig(**language_shape)).to(dtype)
        else:
            language = LlamaForCausalLM.from_pretrained(self.language_directory, dtype=dtype, trust_remote_code=False)
        projector = PixelShuffleProjector(factor=FACTOR).build(vision.config.hidden_size, language.config.hidden_size)
        return vision.eval(), projector, language.eval()


def make_samples(count: int, size: int, num_image_tokens: int, vocabulary: int) -> list[Encoded]:
    """A token in front, the picture, then 8 tokens and more as captions of COCO have, each of them learnt."""
    import numpy as np

    from data_pipeline.sample import Encoded, SampleRef
    from models.spec import IGNORE_INDEX

    numbers, found = np.random.default_rng(0), []
    for place in range(count):
        words = numbers.integers(2, vocabulary - 1, 8 + numbers.poisson(4))
        ids = np.concatenate([[1], np.full(num_image_tokens, vocabulary - 1), words]).astype(np.int32)
        labels = np.where(np.arange(len(ids)) <= num_image_tokens, IGNORE_INDEX, ids).astype(np.int32)
        tiles = numbers.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        found.append(Encoded(SampleRef(0, place, 0, place, "", str(place)), ids, labels, tiles))
    return found


def contest(cell: Cell, parts: Parts, num_rows: int, rounds: int, device: torch.device) -> Row:
    """One line: both ways in turns over the same samples."""
    import torch

    from tools.dev.bench.measure import compare
    from tools.dev.bench.ordinary import PRECISIONS, OrdinaryLoop, OrdinaryModel, TrainerLoop
    from trainer.config.tuning import Lora

    vision, projector, language = parts.make(PRECISIONS[cell.precision])
    side = vision.config.image_size // vision.config.patch_size // FACTOR
    samples = make_samples(num_rows, vision.config.image_size, side**2, language.config.vocab_size)
    lora = cell.plan.language if isinstance(cell.plan.language, Lora) else None
    image_token = language.config.vocab_size - 1
    model = OrdinaryModel(vision, projector, language, feature_layer=FEATURE_LAYER, image_token=image_token, lora=lora)
    is_cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        ours = OurStep(cell, parts, num_rows, device, Path(folder) if cell.is_kept else None)

        def our_rate() -> float:
            return num_rows / _seconds(lambda: ours.step(samples), device)

        def peer_rate() -> float:
            if is_cuda:
                return num_rows / trainer.seconds(samples, 3)
            return num_rows / _seconds(lambda: loop.step(samples), device)

        if is_cuda:
            trainer = TrainerLoop(model, cell.precision, device)
        else:
            loop = OrdinaryLoop(model, cell.precision, device)
        unit = "samples per second" if is_cuda else "samples per CPU second"
        line = compare(cell.title, unit, our_rate, peer_rate, rounds=rounds, packages=PACKAGES)
        ours.close()
    if is_cuda:
        torch.cuda.empty_cache()
    return line


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of the processor, of all threads, on a CPU; of the clock on a GPU."""
    import torch

    if device.type != "cuda":
        start_s = time.process_time()
        work()
        return time.process_time() - start_s
    torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


class OurStep:
    """The trainer's step on one rank; with `kept`, the tower's features are read from there after the first one."""

    def __init__(self, cell: Cell, parts: Parts, num_rows: int, device: torch.device, kept: Path | None) -> None:
        from models.spec import CLIP_MEAN, CLIP_STD, CropImage, ImageSpec, TextSpec
        from models.vision import VisionEncoder
        from models.vlm import VLM
        from tools.dev.bench.ordinary import PRECISIONS
        from trainer.config.schema import AdamW, EngineConfig, GuardConfig
        from trainer.distributed.context import from_environment
        from trainer.engine.engine import build_engine
        from trainer.engine.loss_scale import LossScale
        from trainer.engine.process_group import start_distributed
        from trainer.engine.train_step import TrainingTask, configure_model
        from trainer.engine.tuning import apply_plan
        from trainer.guard import Guard
        from trainer.micro_batches import MicroBatching
        from trainer.objectives.next_token import NextTokenLoss
        from trainer.step import OptimizerStep

        ranks = from_environment()
        start_distributed(ranks, 60.0)
        vision, projector, language = parts.make(PRECISIONS[cell.precision])
        language.config.use_cache = False
        size, patch, words = vision.config.image_size, vision.config.patch_size, language.config.vocab_size
        image = ImageSpec(
            size=size,
            patch_size=patch,
            fit=CropImage(),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            num_projected_tokens=(size // patch // FACTOR) ** 2,
        )
        text = TextSpec(max_length=512, image_token_id=words - 1, pad_token_id=0, vocab_size=words)
        encoder = VisionEncoder(vision, feature_layer=FEATURE_LAYER, num_skipped_tokens=1)
        vlm = VLM(encoder, projector, language, image=image, text=text)
        groups = apply_plan(vlm, cell.plan, seed=1)
        vlm.to(device)
        if kept is not None:
            encoder.keep_features(kept, 20.0)
        config = EngineConfig(precision=cell.precision)  # type: ignore[arg-type]
        configure_model(vlm, config)
        task = TrainingTask(vlm, NextTokenLoss(), cell.precision)
        self._engine = build_engine(
            task, groups, config=config, optimizer=AdamW(), micro_rows=num_rows, num_micro_batches=1, ranks=ranks
        )
        self._step = OptimizerStep(
            self._engine,
            guard=Guard(GuardConfig()),
            loss_scale=LossScale(cell.precision),
            micro_batching=MicroBatching(text, device, num_rows, 1, None),
            ranks=ranks,
            nonfinite=_NoneExpected(),
            seed_of=lambda steps: steps,
        )

    def step(self, samples: Sequence[Encoded]) -> float:
        """One update over these samples as one micro-batch; the loss before it."""
        from trainer.schedule import Consumed
        from trainer.step import BatchTotals, GlobalBatch

        rows: list[tuple[Encoded, ...]] = [(sample,) for sample in samples]
        targets = float(sum(sample.num_targets for sample in samples))
        totals = BatchTotals(targets, len(rows), len(rows), len(rows))
        return self._step.take(GlobalBatch(rows, totals, 0.0), Consumed(), 1.0).loss

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()


class _NoneExpected:
    """The measured steps are finite."""

    def report(self, suspects: list[Any], phase: str, consequence: str, batch: int) -> None:
        """Raise RuntimeError."""
        raise RuntimeError(f"{len(suspects)} rows are not finite in the {phase}: {consequence}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
