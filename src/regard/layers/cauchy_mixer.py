r"""Cauchy mixer: a pair of tokens weighs most where the logits of both are low.

    y_t = 1/sqrt(L D) sum_s m_ts x_s + x_t        m_ts = sum_d 1 / (e^q_td + e^k_sd + 2 b)

x, y: (B,N,C)  q, k: (B,H,N,D), linear in the tokens, and b learned (`data_dependent`); or learned
for each of L positions, and b = 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regard.core.recurrent import widened
from regard.layers.pair_mixers import WIDTH, PairMixer, as_dense, pair_card

_TINY = 1e-8
_LARGEST = 80.0  # its exponential is finite in single precision, and one over it is nothing


class CauchyMixer(PairMixer):
    """Inverse sums of exponentials."""

    def _add_projections(self, qk_dim: int) -> None:
        super()._add_projections(qk_dim)
        self.bias = nn.Parameter(torch.tensor(0.5))

    def between(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """(B,H,N,N)."""
        q, k = (widened(x).clamp_max(_LARGEST).exp() for x in (q, k))
        shift = _TINY + 2 * self.bias if self.data_dependent else _TINY
        pairs = zip((q + shift).unbind(-1), k.unbind(-1), strict=True)  # one channel at a time
        inverses = ((a[..., :, None] + b[..., None, :]).reciprocal() for a, b in pairs)
        return sum(inverses, q.new_zeros(()))


def _sums(state: Mapping[str, Tensor]) -> Tensor:
    q, k = state["queries"].exp(), state["keys"].exp()
    return (1 / (q[:, :, None] + k[:, None] + _TINY)).sum(-1) * WIDTH**-0.5


CAUCHY_MIXER = pair_card(
    "cauchy_mixer",
    CauchyMixer,
    "Cauchy",
    "reads every token with a positive weight",
    as_dense(_sums),
)
