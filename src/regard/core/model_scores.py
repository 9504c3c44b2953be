"""A pretrained model's own scores as a mechanism of the library, so that any executor can run them
through any mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.mask import Mask, both
from regard.core.moment import Moment
from regard.core.scored import attend
from regard.core.weights import Scored


def finished(scores: Tensor, softcap: float | None, bias: Tensor | None) -> Tensor:
    """Scaled scores as the model finishes them: soft-capped, then biased (a tensor that broadcasts
    to them).
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if bias is None else scores + bias


def model_scored(at: Moment) -> Scored:
    """Softmax over the model's scores: soft-capped and biased as the model does it."""
    cap, bias = at.softcap, at.bias
    if cap is None and bias is None:
        return Scored()
    if bias is not None:  # a step may give one number for all queries
        bias = bias.expand(*bias.shape[:2], at.q.shape[2], at.k.shape[2])

    def score(scores: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if bias is None:
            return finished(scores, cap, None)
        b = b if bias.shape[0] > 1 else b * 0
        h = h if bias.shape[1] > 1 else h * 0
        return finished(scores, cap, bias[b, h, row, column])

    return Scored(score=score, captures=() if bias is None else (bias,))


def attend_through(at: Moment, call: Call, mask: Mask | None = None) -> Tensor:
    """The model's attention (B,h,N,E) at a moment, further limited by a mask; `call` is the
    moment's own.
    """
    call = call.but(mask=both(call.mask, mask))
    return attend(at.q, at.k, at.v, call, model_scored(at)).output
