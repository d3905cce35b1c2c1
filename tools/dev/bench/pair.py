"""The two compared implementations of a training step, over the same weights and the same samples.

    peer  LlavaForConditionalGeneration of transformers as in LLaVA's scripts: rows padded to the longest, logits at
    every position, every layer recomputed in the backward ours  VLM + NextTokenLoss: samples one after another, logits
    where there are targets

Owns shapes, samples and the set-up of both; not the measurements (`step`, `gpu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, collate
from data_pipeline.config import RowPacking
from data_pipeline.packing import Packer
from data_pipeline.sample import Encoded, Row, SampleRef
from models.common.source import PartFacts
from models.config import ModelConfig
from models.projectors.mlp import MlpProjector
from models.shapes import Counts
from models.spec import CLIP_MEAN, CLIP_STD, IGNORE_INDEX, CropImage, ImageSpec, TextSpec
from models.vision import VisionEncoder
from models.vlm import VLM
from trainer.config.tuning import Full, Lora, TuningPlan
from trainer.engine.train_step import TrainingTask
from trainer.engine.tuning import apply_plan
from trainer.flops.language import needed_flops
from trainer.flops.shapes import model_shape
from trainer.objectives.next_token import NextTokenLoss

Tuned = Literal["projector", "lora", "full"]


@dataclass(frozen=True)
class Shape:
    """A CLIP tower and a language model, by the fields of their configurations."""

    vision: dict[str, int]
    language_kind: Literal["llama", "mistral", "qwen2", "qwen3"]
    language: dict[str, Any]

    def find(self, path: str) -> PartFacts:
        """The configuration of the part at `path` of `model_of`."""
        return PartFacts(self.vision if path == "vision" else self.language, path, None)

    @property
    def tokens_per_image(self) -> int:
        """Image tokens of one image: the encoder's patches."""
        return int((self.vision["image_size"] // self.vision["patch_size"]) ** 2)

    @property
    def text(self) -> TextSpec:
        """The last row of the vocabulary is the image token."""
        vocabulary = int(self.language["vocab_size"])
        return TextSpec(max_length=4096, image_token_id=vocabulary - 1, pad_token_id=0, vocab_size=vocabulary)


CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
VICUNA_7B = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
QWEN_15B = {
    **QWEN_05B,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
SHAPES = {
    "vicuna7b": Shape(CLIP_L_336, "llama", VICUNA_7B),
    "qwen15b": Shape(CLIP_L_336, "qwen2", QWEN_15B),
    "qwen05b": Shape(CLIP_L_336, "qwen2", QWEN_05B),
}

_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY = {
    name: Shape(
        {**_SMALL, "image_size": 48, "patch_size": 12},
        shape.language_kind,
        {**shape.language, **_SMALL, "num_key_value_heads": 2, "vocab_size": 160},
    )
    for name, shape in SHAPES.items()
}
"""The same architectures, small enough for tests."""


def plan(tuned: Tuned, rank: int = 16) -> TuningPlan:
    """The tuning plan: the projector alone, with adapters on the language model, or with all of the language model."""
    projector = Full(learning_rate=1e-3)
    if tuned == "projector":
        return TuningPlan(projector=projector)
    if tuned == "full":
        return TuningPlan(projector=projector, language=Full(learning_rate=2e-5))
    return TuningPlan(projector=projector, language=Lora(learning_rate=2e-4, rank=rank, alpha=2.0 * rank))


def build_peer(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """The peer with random weights, on `device`, completely frozen."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.auto.configuration_auto import AutoConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision),
        text_config=AutoConfig.for_model(shape.language_kind, **shape.language),
        image_token_id=shape.text.image_token_id,
        image_seq_length=shape.tokens_per_image,
        vision_feature_layer=-2,
        tie_word_embeddings=shape.language["tie_word_embeddings"],
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            peer = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return peer.eval().requires_grad_(False)


def build_ours(peer: Any, shape: Shape) -> VLM:
    """Our model over the peer's frozen weights, without a copy of them; its projector has a copy."""
    from transformers import AutoModelForCausalLM

    vision = VisionEncoder(peer.model.vision_tower, feature_layer=-2, num_skipped_tokens=1)
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(peer.config.text_config, trust_remote_code=False)
    weights = {f"model.{name}": value for name, value in peer.model.language_model.state_dict().items()}
    language.load_state_dict({**weights, "lm_head.weight": peer.lm_head.weight.detach()}, assign=True)
    if shape.language["tie_word_embeddings"]:
        language.tie_weights()
    language.model.rotary_emb = peer.model.language_model.rotary_emb
    theirs = peer.model.multi_modal_projector
    image = ImageSpec(
        size=shape.vision["image_size"],
        patch_size=shape.vision["patch_size"],
        fit=CropImage(),
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
    with theirs.linear_1.weight.device:
        projector = MlpProjector().build(vision.width, shape.language["hidden_size"])
        projector.load_state_dict(theirs.state_dict())
        return VLM(vision, projector, language, image=image, text=shape.text).eval()


class PeerStep(nn.Module):
    """The peer's step as a module: batch -> the sum of its losses. Rows hold one sample each."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, peer: Any, ours: VLM, tuned: Tuned, *, precision: str, recompute: bool, rank: int = 16) -> None:
        super().__init__()
        self.model, self.precision = peer, precision
        self.register_buffer("mean_C", ours.mean_C, persistent=False)
        self.register_buffer("std_C", ours.std_C, persistent=False)
        peer.vision, peer.projector = peer.model.vision_tower, peer.model.multi_modal_projector
        peer.language, peer.future = peer.model.language_model, None
        self.groups = apply_plan(peer, plan(tuned, rank), seed=1)
        del peer.vision, peer.projector, peer.language, peer.future
        if tuned == "full":
            peer.lm_head.requires_grad_(True)
        peer.train()
        if recompute:
            peer.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the losses; the model's own mean times the number of targets."""
        labels = torch.full_like(batch.tokens.targets_BL, IGNORE_INDEX)
        labels[:, 1:] = batch.tokens.targets_BL[:, :-1]
        is_padded = batch.num_tokens < batch.num_positions  # as transformers itself does with a mask of ones
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            mean: Tensor = self.model(
                input_ids=batch.tokens.input_ids_BL,
                attention_mask=(batch.tokens.segment_ids_BL != 0).long() if is_padded else None,
                pixel_values=VLM.normalise(self, batch.images.tiles_TSSC),  # type: ignore[arg-type]  # it has mean_C and std_C
                labels=labels,
                use_cache=False,
            ).loss
        return mean * batch.num_targets


def build_our_step(ours: VLM, tuned: Tuned, *, precision: str, rank: int = 16) -> TrainingTask:
    """The trainer's own step over `ours`; `tuned` selects the trained parts."""
    apply_plan(ours, plan(tuned, rank), seed=1)
    return TrainingTask(ours.train(), NextTokenLoss(), precision)


@dataclass(frozen=True)
class Length:
    """A sample's text tokens, of which the last `num_supervised` are targets, after `num_images` images."""

    num_text: int
    num_supervised: int
    num_images: int = 1


def mixed_lengths(count: int, *, seed: int = 0) -> list[Length]:
    """Text lengths with the long tail of LLaVA-1.5's mixture (synthetic, not its real ones)."""
    numbers = np.random.default_rng(seed)
    texts = np.minimum(np.exp(numbers.normal(5.0, 0.9, count)).astype(int) + 20, 1400)
    return [Length(int(text), max(1, int(text) * 2 // 3)) for text in texts]


def make_samples(shape: Shape, lengths: Sequence[Length], images: Sequence[Any], *, seed: int = 0) -> list[Encoded]:
    """Samples of these lengths with random words; `images` are uint8 [S, S, 3], taken in turn."""
    numbers, found, taken = np.random.default_rng(seed), [], 0
    for place, length in enumerate(lengths):
        words = numbers.integers(1, shape.text.vocab_size - 1, length.num_text).astype(np.int32)
        image = np.full(shape.tokens_per_image * length.num_images, shape.text.image_token_id, np.int32)
        ids = np.concatenate([image, words])
        labels = np.where(np.arange(len(ids)) < len(ids) - length.num_supervised, IGNORE_INDEX, ids).astype(np.int32)
        side = shape.vision["image_size"]
        tiles = [images[(taken + number) % len(images)] for number in range(length.num_images)]
        stacked = np.stack(tiles) if tiles else np.zeros((0, side, side, 3), np.uint8)
        taken += length.num_images
        found.append(Encoded(SampleRef(0, place, 0, place, "", str(place)), ids, labels, stacked))
    return found


def padded_batches(samples: Sequence[Encoded], shape: Shape, rows: int) -> list[Batch]:
    """`rows` samples at a time, in their order, each a row padded to the longest."""
    parts = (samples[start : start + rows] for start in range(0, len(samples), rows))
    return [collate([(sample,) for sample in part], shape.text) for part in parts]


def packed_rows(samples: Sequence[Encoded], row_tokens: int, rows: int) -> list[list[Row]]:
    """Rows of up to `row_tokens` tokens as the trainer's packer makes them, `rows` at a time."""
    waiting = iter(samples)
    packer, packed = Packer(RowPacking(row_tokens=row_tokens)), []
    while row := packer.next_row(lambda: next(waiting, None)):
        packed.append(row)
    return [packed[start : start + rows] for start in range(0, len(packed), rows)]


def packed_batches(samples: Sequence[Encoded], shape: Shape, row_tokens: int, rows: int) -> list[Batch]:
    """`packed_rows` as micro-batches."""
    return [collate(part, shape.text) for part in packed_rows(samples, row_tokens, rows)]


def model_of() -> ModelConfig:
    """The model of both as a recipe's configuration, without weights."""
    return ModelConfig.model_validate(
        {
            "vision": {"kind": "clip", "path": "vision", "feature_layer": -2},
            "projector": {"kind": "mlp"},
            "language": {"kind": "pretrained", "path": "language"},
        }
    )


def needed(shape: Shape, plan: TuningPlan, counts: Counts) -> float:
    """FLOPs that any program must compute for these samples, by arithmetic."""
    parts = needed_flops(model_shape(model_of(), shape.find), plan, counts)
    return sum(part.total for part in parts.values())
