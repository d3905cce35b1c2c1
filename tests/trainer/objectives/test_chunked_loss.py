"""A head's losses a chunk at a time are those of all its logits at once, and so are the gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.objectives.chunked_loss import head_losses


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("num_targets", [0, 7, 8])
def test_chunks_equal_the_whole(learns: bool, num_targets: int) -> None:
    """Chunks of 3, 3 and the rest; each position weighs differently, as no mean would."""
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=False).requires_grad_(learns)
    hidden = torch.randn(num_targets, 6, requires_grad=True)
    targets, weights = torch.randint(0, 11, (num_targets,)), torch.rand(num_targets)
    losses, right = head_losses(head, hidden, targets, logits_at_once=3 * 11 + 5)
    (losses * weights).sum().backward()
    found, head_found = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None

    logits = head(hidden)
    expected = F.cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, hidden.grad)
    assert int(right) == int((logits.argmax(-1) == targets).sum())
    assert (head_found is None) == (not learns)
    if learns:
        torch.testing.assert_close(head_found, head.weight.grad)


@pytest.mark.parametrize("learns", [False, True])
def test_the_logits_never_exist_at_once(learns: bool) -> None:
    """Neither as results of the head nor among what is kept for the backward."""
    head = nn.Linear(4, 50, bias=False).requires_grad_(learns)
    rows: list[int] = []
    head.register_forward_hook(lambda _module, _inputs, logits: rows.append(len(logits)))
    kept: list[int] = []
    hidden, targets = torch.randn(40, 4, requires_grad=True), torch.zeros(40, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        losses, _ = head_losses(head, hidden * 2, targets, logits_at_once=500)
        assert max(kept) <= 10 * 50
        losses.sum().backward()
    assert set(rows) == {10}


@torch.no_grad()
def test_without_a_gradient_nothing_is_prepared_for_one() -> None:
    head = nn.Linear(4, 50, bias=False)
    losses, right = head_losses(head, torch.zeros(9, 4), torch.zeros(9, dtype=torch.long), logits_at_once=100)
    torch.testing.assert_close(losses, torch.full((9,), 50.0).log())
    assert not losses.requires_grad
    assert int(right) == 9
