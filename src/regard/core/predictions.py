"""What a model predicts of a passage: its loss, and how far two predictions are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.core.passage import Passage


def logits_of(output: Any) -> Tensor:
    """The scores a forward gives: of tokens (B,N,V) or of classes (B,V).

    Raises:
        UnsupportedError: it gives none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise UnsupportedError("experiment", "the model gives no logits")
    return found


@dataclass(frozen=True, eq=False)
class Predictions:
    """Log-probabilities (B,T,V) of what comes next, or of a class (T = 1); what does come (B,T);
    which of these count (B,T).
    """

    logs: Tensor
    targets: Tensor
    counted: Tensor

    @classmethod
    def of(cls, output: Any, passage: Passage) -> Predictions:
        """The predictions of a forward: of next tokens where it gives logits (B,N,V), of the label
        where it gives (B,V).

        Raises:
            UnsupportedError: no logits, or neither tokens to predict nor labels.
        """
        logits = logits_of(output)
        if passage.labels is not None and logits.ndim == 2:
            targets = passage.labels[:, None]
            logs = _logs(logits)[:, None]
            return cls(logs, targets, torch.ones_like(targets, dtype=torch.bool))
        tokens = passage.tokens
        if tokens is None or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise UnsupportedError("experiment", "there are no next tokens or labels to predict")
        real = torch.ones_like(tokens, dtype=torch.bool)
        if passage.padding is not None and passage.padding.shape == real.shape:
            real = passage.padding
        counted = real[:, 1:] & real[:, :-1]
        if passage.scored is not None and passage.answer is None:
            counted = counted & passage.scored[:, 1:]
        return cls(_logs(logits[:, :-1]), tokens[:, 1:], counted)

    def losses(self) -> Tensor:
        """Mean negative log-likelihood (B,) of what does come, in nats."""
        return self._mean(-self._of_target())

    def chances(self) -> Tensor:
        """Mean probability (B,) of what does come."""
        return self._mean(self._of_target().exp())

    def kl(self, other: Predictions) -> Tensor:
        """Mean Kullback-Leibler divergence (B,) of the other predictions from these, in nats."""
        return self._mean(_kl(self.logs, other.logs))

    def jsd(self, other: Predictions) -> Tensor:
        """Mean Jensen-Shannon divergence (B,), from 0 to ln 2."""
        middle = torch.logaddexp(self.logs, other.logs) - math.log(2)
        both = _kl(self.logs, middle) + _kl(other.logs, middle)
        return self._mean(both / 2).clamp_max(math.log(2))

    def _of_target(self) -> Tensor:
        return self.logs.gather(-1, self.targets[..., None])[..., 0]

    def _mean(self, values: Tensor) -> Tensor:
        """Mean of values (B,T) over what counts; NaN where nothing does."""
        return values.double().masked_fill(~self.counted, 0.0).sum(-1) / self.counted.sum(-1)


def _kl(logs: Tensor, others: Tensor) -> Tensor:
    """Divergences (B,T) of distributions given by their logarithms (B,T,V); never below 0."""
    return F.kl_div(others, logs, reduction="none", log_target=True).sum(-1).clamp_min(0.0)


def _logs(logits: Tensor) -> Tensor:
    """Log-probabilities, in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
