r"""Mimicry: how far the weights of linear attention are from softmax weights, as a training loss.

    L = - mean_i sum_j p_ij log a_ij        p_i = softmax_j(q_i . k_j / sqrt(D))
    a_ij = phi(q_i) . phi(k_j) / sum_m phi(q_i) . phi(k_m)

q: (B,H,N,D)  k: (B,H_k,M,D)  phi: (B,H,·,F), positive (Hedgehog, 2402.04347, eq. 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.recurrent import inverse
from regard.core.weights import Softmax, group_scores, scale_of


def softmax_weights(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """The teacher's weights (B,H,N,M)."""
    scores = group_scores(q, k) * scale_of(call, None, q.shape[-1])
    visible = _visible(q, k, call)
    return Softmax()(scores, visible, visible.sum(-1, keepdim=True))


def linear_weights(phi_q: Tensor, phi_k: Tensor, call: Call) -> Tensor:
    """The pupil's weights (B,H,N,M)."""
    weights = group_scores(phi_q, phi_k).masked_fill(~_visible(phi_q, phi_k, call), 0.0)
    return weights * inverse(weights.sum(-1, keepdim=True))


def mimicry_loss(q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, call: Call) -> Tensor:
    """Cross-entropy of the pupil against the teacher, a mean over heads and real queries; the
    teacher's side passes no gradient.
    """
    teacher = softmax_weights(q, k, call).detach()
    losses = -(teacher * linear_weights(phi_q, phi_k, call).clamp_min(1e-12).log()).sum(-1)
    if call.query_padding is None:
        return losses.mean()
    real = call.query_padding[:, None].expand_as(losses)
    return losses.masked_fill(~real, 0.0).sum() / real.sum().clamp_min(1)


def _visible(q: Tensor, k: Tensor, call: Call) -> Tensor:
    mask = call.visibility()
    if mask is None:
        return torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return mask.dense(call.frame(q, k))
