r"""Length-scaled cosine attention with a query embedding and a bias continuous in position: what
TransNeXt (2311.17132) and its relatives share.

    q_i = (W_q x_i / |W_q x_i| + e) softplus(tau) log(n_i)        k_j = W_k x_j / |W_k x_j|
    o_i = sum_j softmax_j(q_i . k_j + B(i - j)) v_j               x: (B, h*w, C), row-major

e (H,1,D) and tau (H,1,1) are learned, softplus(tau) starting at 1/0.24; n_i is the number of keys
row i sees. B is a small network on the offset of the two cells, each axis first scaled to 8 units
for the grid of pretraining and then bent by sign(d) log2(1 + |d|) / 3, so that any grid will do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.features.grid import Sides, image_sides
from regard.layers.attention import join_heads, real_tokens, split_heads


class OffsetBias(nn.Module):
    """A bias per head for every pair of a cell and a (perhaps pooled) cell of the same grid."""

    def __init__(self, heads: int, hidden: int = 512) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, heads)

    def forward(self, grid: Sides, pooled: Sides, pretrain: Sides) -> Tensor:
        """(H, h*w, p*r) for a grid (h, w) seen by itself pooled to (p, r). The network runs once
        per distinct offset.
        """
        (rows, row_of), (columns, column_of) = (
            _offsets(side, bins, extent, self.fc1.weight)
            for side, bins, extent in zip(grid, pooled, pretrain, strict=True)
        )
        pairs = torch.cartesian_prod(rows, columns).unflatten(0, (len(rows), len(columns)))
        table = self.fc2(F.relu(self.fc1(pairs))).permute(2, 0, 1)  # (H, offsets, offsets)
        bias = table[:, row_of[:, None, :, None], column_of[None, :, None, :]]
        return bias.flatten(3, 4).flatten(1, 2)


def _offsets(side: int, bins: int, extent: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct scaled offsets (U,) between the cells of an axis and the centres of its bins, and
    which of them each pair has (side, bins). Bins are those of adaptive pooling.
    """
    edges = [(b * side // bins, -(-(b + 1) * side // bins)) for b in range(bins)]
    twice = [[2 * i - (start + stop - 1) for start, stop in edges] for i in range(side)]
    least = min([min(row) for row in twice])
    step = math.gcd(*[value - least for row in twice for value in row]) or 1
    most = max([max(row) for row in twice])
    units = torch.arange(least, most + 1, step, device=like.device).to(like.dtype)
    offsets = units / 2 / max(extent - 1, 1) * 8
    scaled = offsets.sign() * torch.log2(1 + offsets.abs()) / 3
    return scaled, (torch.tensor(twice, device=like.device) - least) // step


class CosineHeads(nn.Module):
    """What the attentions of this kind share: projections, normalised heads, temperature, offsets.

    Args:
        dim: width C. heads: H. bias: on q, k and v. pretrain_grid: the grid that offsets are scaled
            to (default: the one at hand).
    """

    def __init__(
        self, dim: int, heads: int, *, bias: bool = True, pretrain_grid: Sides | None = None
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ArgumentError("heads", f"a divisor of dim={dim}", heads)
        self.dim, self.heads, self.pretrain_grid = dim, heads, pretrain_grid
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim)
        start = math.log(math.expm1(1 / 0.24))
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), start))
        embedding = torch.empty(heads, 1, dim // heads)
        self.query_embedding = nn.Parameter(nn.init.trunc_normal_(embedding, std=0.02))
        self.offsets = OffsetBias(heads)

    def enter(self, x: Tensor, call: Call) -> tuple[Tensor, Call, Sides]:
        """Checked x without padding, the call of self-attention, and the grid."""
        check_tokens(x, self.dim, call)
        refuse(call, type(self).__name__, "scale")
        grid = image_sides(call, x.shape[1], type(self).__name__)
        return real_tokens(x, call.padding), call.of_self(), grid

    def directions(self, x: Tensor, projection: nn.Module) -> Tensor:
        """Heads (B,H,N,D) of length 1."""
        return F.normalize(split_heads(projection(x), self.heads), dim=-1)

    def scaled(self, q: Tensor, count: Tensor) -> Tensor:
        """Queries before the scores, from directions q (B,H,N,D) and key counts (B or 1, N or
        1).
        """
        factor = (
            F.softplus(self.temperature) * count.clamp_min(1).to(q.dtype).log()[:, None, :, None]
        )
        return (q + self.query_embedding) * factor

    def heads_out(self, o: Tensor, x: Tensor, call: Call) -> Tensor:
        """Output (B,N,C) from head outputs o (B,H,N,D); x is the layer's input."""
        return self.o_proj(join_heads(o))


class LengthScaledAttention(CosineHeads):
    """Every cell of the grid attends to every cell."""

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """x (B,h*w,C) -> (B,h*w,C)."""
        x, call, grid = self.enter(x, call)
        count = torch.full((1, 1), x.shape[1], device=x.device)
        if call.padding is not None:
            count = call.padding.sum(-1, keepdim=True)
        q = self.scaled(self.directions(x, self.q_proj), count)
        k, v = self.directions(x, self.k_proj), split_heads(self.v_proj(x), self.heads)
        bias = self.offsets(grid, grid, self.pretrain_grid or grid)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + bias[h, i, j]

        method = Scored(score=score, scale=1.0, captures=(bias,))
        return self.heads_out(attend(q, k, v, call, method).output, x, call)
