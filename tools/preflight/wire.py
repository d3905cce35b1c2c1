"""Bytes that one GPU moves over the wire in a step, from shapes alone, and how long that takes at least.

    ZeRO 0      gradients: one all-reduce, which is a reduction and a gathering
    ZeRO 1      gradients reduced once; weights gathered after the step
    ZeRO 2      gradients reduced in every micro-batch; weights gathered after the step
    ZeRO 3      gradients reduced in every micro-batch; weights, frozen ones too, gathered in every forward, and in the
                backward again, but for those that `stage3_max_live_parameters` lets stay

Whole tensors count: of n ranks each sends and receives (n - 1) / n of that (Rajbhandari et al. 2020, section 7). Norms
and biases below `stage3_param_persistence_threshold` stay gathered under ZeRO-3; their share of a model is below 0.1 %.
An encoder's layers above the feature layer never run, so nobody gathers them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.preflight.geometry import PartCount
from tools.preflight.memory import INT8_BYTES, NF4_BYTES, Storage
from trainer.config.schema import StageConfig
from trainer.config.tuning import Frozen
from trainer.flops.language_memory import FP32

GPUS_OF_A_NODE = 8
NODE_BYTES_PER_S, NETWORK_BYTES_PER_S = 360e9, 45e9
"""Of one GPU: NVLink 4 at 80 % of 450 GB/s one way, and a network card of 400 Gb/s at 90 %. Assumptions."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one GPU in one optimizer step."""

    gathered: float
    reduced: float
    num_gpus: int

    @property
    def bytes_per_s(self) -> float:
        """Of the slowest link on the way."""
        return NODE_BYTES_PER_S if self.num_gpus <= GPUS_OF_A_NODE else NETWORK_BYTES_PER_S

    @property
    def seconds(self) -> float:
        """If nothing else happens meanwhile."""
        return (self.gathered + self.reduced) * (self.num_gpus - 1) / self.num_gpus / self.bytes_per_s


def traffic(counts: dict[str, PartCount], stage: StageConfig, stored: Storage, *, load: str) -> Traffic:
    """That of a stage whose parts have so many parameters."""
    trained = sum(part.trained for part in counts.values())
    num_micro_batches = stage.batch.num_micro_batches(stored.num_gpus)
    weights = float(trained * stored.parameter)
    if stored.num_gpus == 1:
        return Traffic(0.0, 0.0, 1)
    if stored.zero == 0:
        return Traffic(trained * FP32, trained * FP32, stored.num_gpus)
    if stored.zero < 3:
        return Traffic(weights, weights * (num_micro_batches if stored.zero == 2 else 1), stored.num_gpus)
    again = 1.0 - stored.live_share(counts)
    gathered = 0.0
    for name, part in counts.items():
        passes = 1.0 + again if name != "vision" or not isinstance(stage.tune.vision, Frozen) else 1.0
        gathered += passes * _part_bytes(name, part, stage, stored, load)
    return Traffic(num_micro_batches * gathered, num_micro_batches * weights, stored.num_gpus)


def _part_bytes(name: str, part: PartCount, stage: StageConfig, stored: Storage, load: str) -> float:
    element = FP32 if stage.engine.precision == "fp32" else 2
    frozen = float((part.frozen - part.unused) * element)
    if name == "language" and load != "full":
        frozen -= part.quantizable * (element - (NF4_BYTES if load == "nf4" else INT8_BYTES))
    return frozen + part.trained * stored.parameter
