"""The loss over label tokens: with all logits, and without any but those that it needs."""

import torch
from tolerance import close
from torch import nn

from lavish.nn.losses import NO_LOGITS, logits_and_loss


def test_the_loss_without_logits_is_the_loss_with_them() -> None:
    head = nn.Linear(8, 11, bias=False)
    states = torch.randn(2, 6, 8)
    labels = torch.tensor([[-100, -100, 3, 4, -100, 5], [1, -100, -100, -100, -100, 2]])
    found = []
    for keep in (0, NO_LOGITS):
        rows = states.clone().requires_grad_()
        logits, loss = logits_and_loss(head, rows, labels, keep)
        assert loss is not None
        (gradient,) = torch.autograd.grad(loss, rows)
        found.append((loss.detach(), gradient))
        assert logits is None if keep == NO_LOGITS else logits.shape == (2, 6, 11)
    for whole, alone in zip(*found, strict=True):
        close(alone, whole)


def test_without_a_label_the_loss_is_nothing() -> None:
    states = torch.randn(1, 3, 4, requires_grad=True)
    _, loss = logits_and_loss(nn.Linear(4, 5), states, torch.full((1, 3), -100), NO_LOGITS)
    assert loss == 0
    loss.backward()
    assert not states.grad.any()
