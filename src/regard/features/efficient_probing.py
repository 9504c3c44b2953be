r"""Efficient probing: learned queries compare with the tokens as they are, and each pools its own
slice of the values.

    a_q = softmax_n(u_q . x_n s)        y = concat_q sum_n a_qn (W_v x_n)_q        q = 1 … Q

x: (B,N,C); u: (Q,C); W_v: C -> C/shrink, cut into Q slices; y: (B,C/shrink). s is 1/sqrt(C) with
the whole width. No W_q, no W_k, no W_o: QC + C^2/shrink parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.features.pooling import admitted, asked, split


class EfficientProbing(nn.Module):
    """(B,N,dim) -> (B,dim/shrink). queries: Q; bias: of W_v; scale: s."""

    def __init__(
        self,
        dim: int,
        *,
        queries: int = 32,
        shrink: int = 1,
        bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if min(dim, queries, shrink) < 1 or dim % (shrink * queries):
            raise ArgumentError("queries, shrink", f"divide dim={dim} together", (queries, shrink))
        self.scale = scale
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.value = nn.Linear(dim, dim // shrink, bias=bias)

    def forward(
        self, x: Tensor, padding: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """padding (B,N): True = real; queries (B or 1,Q,C): instead of the learned ones.

        Raises:
            ArgumentError: other shapes.
        """
        x, call = admitted(x, self.queries.shape[1], padding)
        q = asked(self.queries, queries, len(x))[:, :, None]  # a head per query
        v = split(self.value(x), len(self.queries))
        return attend(q, x[:, None], v, call, Scored(scale=self.scale)).output.flatten(1)


def converted(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> EfficientProbing:
    """A pool with the authors' weights."""
    _, queries, dim = state["cls_token"].shape
    value = state["v.weight"]
    pool = EfficientProbing(
        dim,
        queries=queries,
        shrink=dim // len(value),
        bias="v.bias" in state,
        scale=config.get("qk_scale"),
    ).to(value.dtype)
    names = {name.replace("v.", "value."): x for name, x in state.items() if name != "cls_token"}
    pool.load_state_dict({"queries": state["cls_token"][0], **names})
    return pool.eval()
