r"""Attention whose map is not made from the layer's input: queries and keys come from a source,
values from the hidden states.

    A = softmax(X W_q (X W_k)^T / sqrt(D))        y = W_o A (h W_v)        h, X: (B,N,C)

`static_emb_qk`: X are the token embeddings of the input, in every layer. `rnd_emb_qk`: X starts
from fixed noise, one vector per position, N(0, 0.02^2). `fixed_seq_qk`: X starts from the
embeddings of one fixed text. In the paper, noise and text run through the layers below, as a second
stream: a backbone may hand each layer its X as `context` (B or 1,N,C). Without one, static_emb_qk
reads the call's embeddings, or else h itself (then it is standard attention), the others their
fixed vectors, so that the map is the same for every input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_tokens
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.state import Decoding, arrivals
from regard.features.rotary import Style
from regard.layers.attention import Attention, Norm


class Half(nn.Linear):
    """A linear map of one half (0 or 1) of the channels of its input (…,2C)."""

    def __init__(self, like: nn.Linear, side: int) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        self.side = side

    def forward(self, input: Tensor) -> Tensor:
        """(…,2C) -> (…,out)."""
        return super().forward(input.chunk(2, -1)[self.side])


class StaticEmbQK(Attention):
    """Attention with queries and keys from a source, (B,N,C) -> (B,N,C).

    Inside, tokens carry their source beside them, (B,N,2C), so that masking, padding, heads and
    decoding are those of Attention.

    Args:
        dim: width C. heads: query heads. Everything else as in Attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        operator: str = "softmax",
        options: Mapping[str, Any] | None = None,
        kv_heads: int | None = None,
        rope: Style | None = None,
        qk_norm: Norm | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(
            dim, heads, operator, options, kv_heads=kv_heads, rope=rope, qk_norm=qk_norm, bias=bias
        )
        self.width, self.dim = dim, 2 * dim  # Attention checks the width of what it is given
        self.q_proj, self.k_proj = Half(self.q_proj, 1), Half(self.k_proj, 1)
        self.v_proj = Half(self.v_proj, 0)

    def source(self, x: Tensor, positions: Tensor, call: Call) -> Tensor:
        """Source (B or 1,N,C) of tokens x (B,N,C) at positions (B or 1,N), if none is given."""
        return x if call.embeddings is None else call.embeddings

    def forward(self, x: Tensor, call: Call = Call(), context: Tensor | None = None) -> Tensor:
        """x (B,N,C) -> (B,N,C); `context` is the source (B or 1,N,C) of queries and keys."""
        check_tokens(x, self.width, call)
        _, positions = call.positions(x.shape[1], x.shape[1], x.device)
        return super().forward(self._paired(x, context, positions, call), call)

    def step(
        self,
        x: Tensor,
        state: Decoding | None,
        call: Call = Call(mask=Causal()),
        context: Tensor | None = None,
    ) -> tuple[Tensor, Decoding]:
        """Causal decoding of new tokens x (B,T,C), whose source is `context` (B or 1,T,C)."""
        check_tokens(x, self.width, call)
        positions, _, _ = arrivals(x, call, None if state is None else state.seen)
        return super().step(self._paired(x, context, positions, call), state, call)

    def _paired(self, x: Tensor, context: Tensor | None, positions: Tensor, call: Call) -> Tensor:
        source = self.source(x, positions, call) if context is None else context
        batch = x.shape[0]
        if source.shape[1:] != x.shape[1:] or source.shape[0] not in (1, batch):
            expected = f"a source (1 or {batch}, {x.shape[1]}, {self.width})"
            raise ArgumentError("context", expected, tuple(source.shape))
        return torch.cat([x, source.to(x.dtype).expand(batch, -1, -1)], -1)


class FixedSeqQK(StaticEmbQK):
    """Queries and keys from the vectors of one fixed sequence, (B,N,C) -> (B,N,C).

    Args:
        dim: width C. heads: query heads. source: vectors (L,C), one per position, saved with the
            layer and not trained; longer inputs are refused. Everything else as in Attention.
    """

    vectors: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        source: Tensor,
        rope: Style | None = None,
        qk_norm: Norm | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, rope=rope, qk_norm=qk_norm, bias=bias)
        if source.ndim != 2 or source.shape[1] != dim:
            raise ArgumentError("source", f"vectors (L, {dim})", tuple(source.shape))
        self.register_buffer("vectors", source.detach().clone())

    def source(self, x: Tensor, positions: Tensor, call: Call) -> Tensor:
        """The fixed vectors at these positions."""
        length = self.vectors.shape[0]
        unseen = torch.compiler.is_compiling() or positions.numel() == 0
        last = x.shape[1] - 1 if unseen else int(positions.max())
        if last >= length:
            raise ArgumentError("x", f"positions below {length}, one per vector", last)
        return F.embedding(positions, self.vectors)


class RndEmbQK(FixedSeqQK):
    """Queries and keys from fixed noise, (B,N,C) -> (B,N,C).

    Args:
        dim: width C. heads: query heads. max_length: positions that have noise. std: of the noise.
            Everything else as in Attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        max_length: int = 2048,
        std: float = 0.02,
        rope: Style | None = None,
        qk_norm: Norm | None = None,
        bias: bool = False,
    ) -> None:
        noise = std * torch.randn(max_length, dim)
        super().__init__(dim, heads, source=noise, rope=rope, qk_norm=qk_norm, bias=bias)


def _silence(layer: RndEmbQK) -> None:
    layer.vectors.zero_()


def _looking_at_nothing(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same layer with zero queries and keys, and without vectors."""
    own = {name: x for name, x in state.items() if name != "vectors"}
    return own | {f"{part}_proj.weight": torch.zeros_like(own["q_proj.weight"]) for part in "qk"}


_PAPER = Paper(
    "2510.11602",
    "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    2025,
)
_ONE_STREAM = (
    "the vectors enter every layer as they are; the paper runs them through the layers below",
)
_LONGEST = 192  # tokens that the small examples reach, decoding included


def _some_sequence(size: tuple[int, ...]) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(2)
    return {"source": torch.randn(max(_LONGEST, 2 * size[0]), 32, generator=seeded)}


STATIC_EMB_QK_CARD = Card(
    name="static_emb_qk",
    kind="layer",
    build=StaticEmbQK,
    papers=(_PAPER,),
    family="scored",
    patterns=("noncausal self", "causal self"),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "loses little against softmax: what to look at can be read off the embeddings",
        "regard compare --task recall --mechanisms softmax,static_emb_qk",
    ),
    limits=(Limit({}, "ssa", {"slope": None, "token": False, "values": False}),),
)

RND_EMB_QK_CARD = Card(
    name="rnd_emb_qk",
    kind="layer",
    build=RndEmbQK,
    papers=(_PAPER,),
    family="scored",
    patterns=STATIC_EMB_QK_CARD.patterns,
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "mixes by position alone, so it cannot look anything up",
        "regard compare --task recall --mechanisms softmax,rnd_emb_qk",
    ),
    deviations=_ONE_STREAM,
    example=Example(sized=lambda size: {"max_length": max(_LONGEST, 2 * size[0]), "std": 1.0}),
    limits=(Limit({}, "static_emb_qk", prepare=_silence, weights=_looking_at_nothing),),
)

FIXED_SEQ_QK_CARD = Card(
    name="fixed_seq_qk",
    kind="layer",
    build=FixedSeqQK,
    papers=(_PAPER,),
    family="scored",
    patterns=STATIC_EMB_QK_CARD.patterns,
    cost=Cost(time=2, state="keys"),
    claim=Claim("mixes every input by the map of one text", "regard show fixed_seq_qk"),
    deviations=_ONE_STREAM,
    example=Example(sized=_some_sequence),
    limits=(Limit({}, "rnd_emb_qk", {"max_length": _LONGEST}),),
)
