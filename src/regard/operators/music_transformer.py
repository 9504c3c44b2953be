r"""Relative attention of the Music Transformer: a learned vector per distance enters the scores.

    s_ij = (q_i . k_j + q_i . E[p_j - p_i]) s        o_i = sum_j softmax_j(s_i) (v_j + F[p_j - p_i])

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E). s is 1/sqrt(D), p are absolute positions. E is a table
(H,R,D), or (R,D) shared by the heads: rows 0 … reach-1 hold the distances reach-1 … 0 to the past;
`two_sided` adds reach-1 rows for the future. Beyond the table nothing is added. F, on request, is a
table of the same shape for values.

No (N,N,D) tensor is built: q meets every row of the table once, (B,H,N,R), and each pair then finds
its row: "gather" looks it up, at any positions, and runs tile by tile; "skew" shifts row i of the
product by i places, which needs consecutive positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.frame import Frame
from regard.core.mask import Causal
from regard.core.scored import TILED_FROM, attend, without_padding
from regard.core.weights import (
    Scored,
    Softmax,
    group_scores,
    group_values,
    modified_scores,
    normalised,
    scale_of,
)
from regard.scores.relative import (
    consecutive_rows,
    relative,
    relative_bias,
    relative_rows,
    skew,
    unskew,
)

Form = Literal["auto", "gather", "skew"]


class MusicTransformer(nn.Module):
    """Relative attention on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E).

    Args:
        reach: distances 0 … reach-1 have a vector. two_sided: also those to later keys. shared: one
            table for all heads. values: a second table for the values (E = head_dim). form:
            "gather", "skew", or "auto": skew for short calls that bring neither positions nor
            padding.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        reach: int = 512,
        two_sided: bool = False,
        shared: bool = False,
        values: bool = False,
        form: Form = "auto",
    ) -> None:
        super().__init__()
        if reach < 1:
            raise ArgumentError("reach", "at least 1", reach)
        if form not in ("auto", "gather", "skew"):
            raise ArgumentError("form", "'auto', 'gather' or 'skew'", form)
        self.reach, self.two_sided, self.form = reach, two_sided, form
        rows = 2 * reach - 1 if two_sided else reach
        shape = (rows, head_dim) if shared else (heads, rows, head_dim)
        self.key_table = nn.Parameter(torch.randn(shape) * head_dim**-0.5)
        self.value_table = nn.Parameter(torch.randn(shape) * head_dim**-0.5) if values else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Output (B,H,N,E).

        Raises:
            UnsupportedError: a noncausal call with a one-sided table, or positions that
                form="skew" cannot serve.
        """
        check_qkv(q, k, v, call)
        if call.mask is None and not self.two_sided:
            raise UnsupportedError(
                "music_transformer",
                "a noncausal call needs distances to later keys: two_sided=True",
            )
        width = self.key_table.shape[-1]
        if q.shape[-1] != width or (self.value_table is not None and v.shape[-1] != width):
            raise ArgumentError("q, v", f"heads of width {width}", (q.shape[-1], v.shape[-1]))
        q, k, v = without_padding(q, k, v, call)
        frame, skewed = call.frame(q, k), self._skewed(call, max(q.shape[2], k.shape[2]))
        if self.value_table is None and not skewed:
            long = min(q.shape[2], k.shape[2]) >= TILED_FROM and not torch.compiler.is_compiling()
            method = self._block_method(q, call) if long else self._method(q, frame, call)
            return attend(q, k, v, call, method)
        scores = self._scores(q, k, frame, skewed, call)
        mask = call.visibility()
        every = torch.ones_like(scores[:1, :1], dtype=torch.bool)
        weights, _ = normalised(
            scores, every if mask is None else mask.dense(frame), Softmax(), need_lse=False
        )
        o = group_values(weights, v)
        if self.value_table is not None:
            o = o + self._value_side(weights, self.value_table, frame, skewed)
        if call.query_padding is not None:
            o = o.masked_fill(~call.query_padding[:, None, :, None], 0.0)
        return Result(o)

    def _skewed(self, call: Call, length: int) -> bool:
        fields = ("padding", "query_positions", "key_positions")
        obstacle = next((name for name in fields if getattr(call, name) is not None), None)
        if self.form == "skew" and obstacle:
            raise UnsupportedError(
                "form='skew'", f"with call.{obstacle}, positions may not be consecutive"
            )
        if self.form == "auto":
            return obstacle is None and length < TILED_FROM
        return self.form == "skew"

    def _method(self, q: Tensor, frame: Frame, call: Call) -> Scored:
        """Softmax with the distances' share looked up, as data."""
        by_row = q @ self.key_table.transpose(-1, -2) * scale_of(call, None, q.shape[-1])
        return Scored(score=relative(by_row, frame, self.reach), captures=(by_row,))

    def _block_method(self, q: Tensor, call: Call) -> Scored:
        """The same with the distances' share computed block by block, in memory linear in N."""
        bias = relative_bias(self.key_table, self.reach, scale_of(call, None, q.shape[-1]))
        return Scored(block_bias=bias, captures=(self.key_table,))

    def _scores(self, q: Tensor, k: Tensor, frame: Frame, skewed: bool, call: Call) -> Tensor:
        """Scaled scores (B,H,N,M), the distances' share included."""
        scores, scale = group_scores(q, k), scale_of(call, None, q.shape[-1])
        if not skewed:
            return modified_scores(scores * scale, self._method(q, frame, call), frame.all(), q)
        used = consecutive_rows(self.key_table, self.reach, q.shape[2], k.shape[2])
        return (scores + skew(q @ used.transpose(-1, -2), k.shape[2])) * scale

    def _value_side(self, weights: Tensor, table: Tensor, frame: Frame, skewed: bool) -> Tensor:
        """sum_j a_ij F[p_j - p_i], (B,H,N,E): weights (B,H,N,M), summed by table row."""
        n, m = weights.shape[2:]
        if skewed:
            return unskew(weights) @ consecutive_rows(table, self.reach, n, m)
        row, near = relative_rows(frame.all(), self.reach, table.shape[-2])
        by_row = weights.new_zeros(*weights.shape[:3], table.shape[-2])
        return by_row.scatter_add(-1, row.expand_as(weights), weights.masked_fill(~near, 0)) @ table


def convert(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> MusicTransformer:
    """The operator with the tables of tensor2tensor's relative attention (version 2)."""
    table = state["key_relative_embeddings"]
    module = MusicTransformer(
        1 if table.ndim == 2 else table.shape[0],
        table.shape[-1],
        reach=config["max_relative_position"],
        two_sided=not config["causal"],
        shared=config["heads_share_relative_embedding"],
        values=config["add_relative_to_values"],
    ).to(table.dtype)
    names = {"key_relative_embeddings": "key_table", "value_relative_embeddings": "value_table"}
    module.load_state_dict({names[name]: x for name, x in state.items()})
    return module


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    module = convert(case["config"], case["state_dict"])
    q, k, v = (case["inputs"][name] for name in "qkv")
    call = Call(mask=Causal() if case["config"]["causal"] else None, scale=1.0)
    return {"y": module(q, k, v, call).output}


def _without_distances(module: MusicTransformer) -> None:
    for table in module.parameters():
        nn.init.zeros_(table)


MUSIC_TRANSFORMER_CARD = Card(
    name="music_transformer",
    kind="operator",
    build=MusicTransformer,
    papers=(Paper("1809.04281", "Music Transformer", 2018),),
    family="scored",
    patterns=("noncausal self", "causal self", "causal cross"),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "knows how far back a key lies without any other position signal",
        "regard compare --task copying --mechanisms softmax,music_transformer",
    ),
    example=Example(options={"reach": 5, "two_sided": True, "values": True}),
    limits=(Limit({}, "softmax", prepare=_without_distances),),
    forms=("form", ("gather", "skew")),
    goldens=(
        Golden(
            "59_music_transformer.pt",
            _replay,
            "tensorflow/tensor2tensor: tensor2tensor/layers/common_attention.py: "
            "dot_product_self_attention_relative_v2, "
            "dot_product_unmasked_self_attention_relative_v2",
            "bafdc1b6",
        ),
    ),
    convert=convert,
)
