r"""Vandermonde mixer: what one token says is weighed by where the other stands.

    y_t = c sum_s m_ts x_s + x_t        m_ts = sum_d cos(w s q_td) - cos(w t k_sd)

x, y: (B,N,C)  q, k: (B,H,N,D), linear in the tokens, w = 2 pi / 1000, c = 1/sqrt(2 L D). Without
`data_dependent` the matrix is that of the cosine transform, with nothing to learn: m_ts =
cos(2 pi t s / L), c = 1/sqrt(L).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from regard.core.recurrent import widened
from regard.layers.justdense import EXAMPLE
from regard.layers.pair_mixers import PairMixer, as_dense, pair_card


class VandermondeMixer(PairMixer):
    """Cosines of what one token says times where the other stands; or the cosine transform."""

    def _add_free(self, qk_dim: int) -> None:
        self.scale = self.length**-0.5

    def matrix(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B or 1, H, N, N)."""
        if self.data_dependent:
            return super().matrix(x, visible)
        return cosines(self.length, x)[: x.shape[1], : x.shape[1]].expand(1, self.heads, -1, -1)

    def between(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """(B,H,N,N)."""
        q, k = (widened(x) * (2e-3 * math.pi) for x in (q, k))
        places = torch.arange(q.shape[2], device=q.device, dtype=q.dtype)
        pairs = zip(q.unbind(-1), k.unbind(-1), strict=True)  # one channel at a time
        waves = (
            (a[..., :, None] * places).cos() - (b[..., None, :] * places[:, None]).cos()
            for a, b in pairs
        )
        return sum(waves, q.new_zeros(())) * 2**-0.5


def cosines(length: int, like: Tensor) -> Tensor:
    """The matrix cos(2 pi t s / L), (L,L)."""
    rows = torch.arange(length, device=like.device)
    turns = (rows[:, None] * rows % length).to(torch.float64) / length
    return (2 * math.pi * turns).cos().to(like.dtype)


def _transform(state: Mapping[str, Tensor]) -> Tensor:
    like = torch.zeros(1, dtype=torch.float64)
    return cosines(EXAMPLE.options["length"], like).expand(EXAMPLE.heads, -1, -1)


VANDERMONDE_MIXER = replace(
    pair_card(
        "vandermonde_mixer",
        VandermondeMixer,
        "Vandermonde",
        "weighs what one token says by where the other stands",
        as_dense(_transform),
    ),
    grids=(1,),
)
