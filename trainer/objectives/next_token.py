"""Next-token prediction: from a batch to a sum of losses and the counts to divide by. Sums, never means.

B rows, K targets, D the language model's width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from data_pipeline.batch import Batch
from models.attention import Segments
from models.decoder import Packed
from models.scaled_head import output_head
from models.vlm import VLM
from trainer.objectives.base import LanguageObjective
from trainer.objectives.chunked_loss import head_losses
from trainer.objectives.loss_sum import BatchLoss, LossSum


class NextToken(LanguageObjective):
    """Predict each supervised token from the tokens before it."""

    kind: Literal["next_token"] = "next_token"

    def build(self) -> BatchLoss:
        """See `ObjectiveConfig.build`."""
        return NextTokenLoss()


class NextTokenLoss:
    """Cross-entropy of the next token at supervised positions; logits of the others are never computed."""

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """Sums for one micro-batch. A batch without targets gives a 0 that still depends on every parameter."""
        hidden_KD = vlm.hidden_states(pack(batch), batch.images)
        targets_K = batch.layout.without_padding(batch.tokens.targets_BL)[batch.layout.supervised_K]
        losses_K, num_correct = head_losses(output_head(vlm.language), hidden_KD, targets_K)
        return LossSum(losses_K.sum(), num_correct, sums_by_row(losses_K, batch))


def pack(batch: Batch) -> Packed:
    """A batch's samples one after another, without its padding; hidden states are wanted at its targets."""
    tokens, layout = batch.tokens, batch.layout
    return Packed(
        input_ids_N=layout.without_padding(tokens.input_ids_BL),
        position_ids_N=layout.without_padding(tokens.position_ids_BL),
        image_I=layout.image_I,
        segments=Segments.of(layout.segment_starts_G1, layout.segment_lengths),
        wanted_K=layout.supervised_K,
        rope_3N=layout.rope_3N,
    )


def sums_by_row(losses_K: Tensor, batch: Batch) -> Tensor:
    """The sums [B] of the losses of a batch's targets, row by row, detached."""
    sums_B = losses_K.new_zeros(len(batch.keys))
    return sums_B.index_add(0, batch.layout.target_rows_K, losses_K.detach())
