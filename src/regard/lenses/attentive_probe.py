r"""Attentive probing: what frozen tokens know about a label, read through a trained pool.

    logits = W batchnorm(pool(x)) + b        x: (B,N,C), from a model that is not trained

The batch norm has no parameters. With the mean as pool this is linear probing; the pools of
`regard.features` see tokens apart, as models pretrained on masked images need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Labelled:
    """Frozen tokens (n,N,C), their labels (n,), integers from 0, and padding (n,N), True = real."""

    tokens: Tensor
    labels: Tensor
    padding: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or len(self.tokens) == 0:
            raise ArgumentError("tokens", "(n,N,C) with n above 0", tuple(self.tokens.shape))
        if self.labels.shape != self.tokens.shape[:1] or self.labels.dtype != torch.long:
            expected = f"{len(self.tokens)} integers (torch.long)"
            raise ArgumentError("labels", expected, (tuple(self.labels.shape), self.labels.dtype))
        if self.padding is not None and self.padding.shape != self.tokens.shape[:2]:
            expected = tuple(self.tokens.shape[:2])
            raise ArgumentError("padding", f"shape {expected}", tuple(self.padding.shape))

    def rows(self, index: Tensor | slice) -> Labelled:
        """Some of them."""
        padding = None if self.padding is None else self.padding[index]
        return Labelled(self.tokens[index], self.labels[index], padding)


class ProbeHead(nn.Module):
    """Tokens (B,N,C) -> logits (B,classes) through a pool whose vectors are `width` wide. The
    classifier starts at zero.
    """

    def __init__(self, pool: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.classifier = nn.utils.skip_init(nn.Linear, width, classes)
        for weight in self.classifier.parameters():
            nn.init.zeros_(weight)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """padding (B,N): True = real."""
        return self.classifier(self.norm(self.pool(tokens, padding)))


@dataclass(frozen=True, eq=False)
class Probed:
    """A trained head, its mean training loss in each epoch (nats), and its accuracy on the test."""

    head: ProbeHead
    losses: tuple[float, ...]
    accuracy: float


def probe_features(
    train: Labelled,
    test: Labelled,
    pool: nn.Module,
    *,
    epochs: int = 30,
    batch: int = 128,
    rate: float = 1e-2,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Probed:
    """Train a pool (called with tokens and padding) and a classifier on frozen tokens: AdamW
    without decay, the rate falling to zero along a cosine; the seed orders the samples. The pool is
    trained in place. progress is told the share done.

    Raises:
        ArgumentError: fewer than two training samples, or widths that differ.
    """
    if len(train.tokens) < 2 or epochs < 1 or batch < 2:
        raise ArgumentError(
            "train, epochs, batch", "2 samples, 1 epoch, batches of 2 or more", epochs
        )
    if test.tokens.shape[2] != train.tokens.shape[2]:
        raise ArgumentError("test", f"tokens {train.tokens.shape[2]} wide", test.tokens.shape[2])
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    head = ProbeHead(pool, _width(pool, train), classes).to(train.tokens)
    optimiser = torch.optim.AdamW(head.parameters(), rate, weight_decay=0.0)
    starts = range(0, len(train.tokens) - 1, batch)  # a last sample by itself has no statistics
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(starts))
    draw, losses = torch.Generator().manual_seed(seed), []
    for epoch in range(epochs):
        head.train()
        order, total = torch.randperm(len(train.tokens), generator=draw), 0.0
        for start in starts:
            some = train.rows(order[start : start + batch])
            loss = F.cross_entropy(head(some.tokens, some.padding), some.labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        losses.append(total / len(starts))
        if progress is not None:
            progress((epoch + 1) / epochs)
    return Probed(head, tuple(losses), accuracy(head, test, batch))


@torch.no_grad()
def accuracy(head: ProbeHead, test: Labelled, batch: int = 128) -> float:
    """Share of samples whose label has the largest logit."""
    head.eval()
    right = 0
    for start in range(0, len(test.tokens), batch):
        some = test.rows(slice(start, start + batch))
        right += int((head(some.tokens, some.padding).argmax(-1) == some.labels).sum())
    return right / len(test.tokens)


@torch.no_grad()
def _width(pool: nn.Module, sample: Labelled) -> int:
    """How wide a pool's vectors are, tried on one sample."""
    some = sample.rows(slice(0, 1))
    shape = pool.to(some.tokens).eval()(some.tokens, some.padding).shape
    if len(shape) != 2 or shape[0] != 1:
        raise ArgumentError("pool", "one vector per sample", tuple(shape))
    return shape[1]
