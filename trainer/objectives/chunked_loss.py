"""Cross-entropy of an output head at K positions, a chunk of them at a time: K x V logits never exist at once.

    hidden_KD --chunk--> head --> logits --> losses, right predictions
                          '--> a frozen head: gradient of the hidden states, kept until the backward
                          '--> a trained head: nothing kept; the backward recomputes the chunk

With a frozen head the gradient is computed together with the forward, since later operations only multiply it by a
factor per position: two products with the head instead of three, and none for its weights. K positions, D width, V
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26
"""A chunk's logits: 0.25 GiB in fp32, of which softmax and its gradient need about three."""


def head_losses(
    head: Any, hidden_KD: Tensor, targets_K: Tensor, *, logits_at_once: int = LOGITS_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """The losses [K] in fp32, and how many targets had the largest logit."""
    num_rows = max(1, logits_at_once // int(head.out_features))
    if not hidden_KD.requires_grad or any(parameter.requires_grad for parameter in head.parameters()):
        parts = [
            _chunk(head, *part) if not torch.is_grad_enabled() else checkpoint(_chunk, head, *part, use_reentrant=False)
            for part in _chunks(hidden_KD, targets_K, num_rows)
        ]
        return torch.cat([losses for losses, _ in parts]), torch.stack([right for _, right in parts]).sum()
    losses_K, num_right = _FrozenHeadLosses.apply(hidden_KD, targets_K, head, num_rows)
    return losses_K, num_right


def _chunks(hidden_KD: Tensor, targets_K: Tensor, num_rows: int) -> list[tuple[Tensor, Tensor]]:
    """At least one chunk, which may be empty, so that the head is called on every rank (ZeRO-3 gathers it there)."""
    return list(zip(hidden_KD.split(num_rows), targets_K.split(num_rows), strict=True))


def _chunk(head: nn.Module, hidden_KD: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
    logits_KV = head(hidden_KD).float()
    losses_K = F.cross_entropy(logits_KV, targets_K, reduction="none")
    return losses_K, (logits_KV.detach().argmax(-1) == targets_K).sum()


class _FrozenHeadLosses(Function):
    """Losses whose gradient with respect to the hidden states is computed chunk by chunk in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KD: Tensor, targets_K: Tensor, head: nn.Module, num_rows: int
    ) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        num_right = torch.zeros((), dtype=torch.int64, device=hidden_KD.device)
        for part_KD, part_K in _chunks(hidden_KD, targets_K, num_rows):
            with torch.enable_grad():
                leaf_KD = part_KD.detach().requires_grad_()
                losses_K, right = _chunk(head, leaf_KD, part_K)
                gradients += torch.autograd.grad(losses_K.sum(), leaf_KD)
            losses.append(losses_K.detach())
            num_right += right
        ctx.save_for_backward(torch.cat(gradients))
        ctx.mark_non_differentiable(num_right)
        return torch.cat(losses), num_right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss_K: Tensor, _by_right: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_KD,) = ctx.saved_tensors
        return (gradient_KD * by_loss_K.unsqueeze(-1)).to(gradient_KD.dtype), None, None, None
