r"""DeltaNet: linear attention whose writes replace what the memory already answers to their key.

    q, k, v = SiLU(conv(W x))        beta = sigmoid(W_b x)        x: (B,N,C)  beta: (B,H,N)
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(D)
    y = W_o concat_h rms(o_h)        q, k at length one, (B,H,N,D)  S: (B,H,D,D)

conv is a short causal convolution per channel. Linear attention only adds, so keys that are no
longer wanted stay in the way; here a write with beta = 1 leaves v_t as the only answer to k_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Paper
from regard.core.delta import DeltaForm, DeltaRule, delta, unit
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.recurrent import Memory, widened
from regard.core.state import Decoding, arrivals
from regard.features.causal_conv import LearnedTaps, Recent, carried_conv
from regard.layers.attention import join_heads, real_tokens, split_heads


@dataclass(frozen=True, eq=False)
class DeltaState:
    """Decode state: the memory of every head, and the tokens that the convolution still reads."""

    memory: Memory
    recent: Recent | None


class DeltaNet(nn.Module):
    """DeltaNet layer, causal, (B,N,C) -> (B,N,C).

    Args:
        dim: C. heads: H. head_dim: D (default C/H). conv: taps of the short convolution, 0 = none.
        chunk: block length of the chunk form.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        conv: int = 4,
        chunk: int = 32,
        form: DeltaForm = "auto",
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or (head_dim is None and dim % heads):
            raise ArgumentError("dim, heads", "heads a divisor of dim", (dim, heads))
        if conv < 0 or chunk < 1:
            raise ArgumentError("conv, chunk", "conv >= 0, chunk >= 1", (conv, chunk))
        self.dim, self.heads, self.head_dim = dim, heads, head_dim or dim // heads
        self.chunk = chunk
        self.form: DeltaForm = form
        width = heads * self.head_dim
        self.qkv_proj = nn.Linear(dim, 3 * width, bias=False)
        self.conv = LearnedTaps(3 * width, conv) if conv else None
        self.beta_proj = nn.Linear(dim, heads, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.o_proj = nn.Linear(width, dim, bias=False)

    def rates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """beta and the log decay (none here), (B,H,N), of x (B,N,C)."""
        return widened(self.beta_proj(x)).sigmoid().mT, None

    def heads_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Output (B,N,C) from head outputs o (B,H,N,D) and the layer's input."""
        return self.o_proj(join_heads(self.norm(o)))

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """x (B,N,C) -> (B,N,C), causal self-attention."""
        return self._advance(x, None, call)[0]

    def step(
        self, x: Tensor, state: Decoding | None, call: Call = Call(mask=Causal())
    ) -> tuple[Tensor, Decoding]:
        """Causal decoding: new tokens x (B,T,C) after `state` -> (B,T,C) and the state after."""
        y, after = self._advance(x, None if state is None else state.inner, call)
        return y, Decoding(arrivals(x, call, None if state is None else state.seen)[2], after)

    def _advance(
        self, x: Tensor, state: DeltaState | None, call: Call
    ) -> tuple[Tensor, DeltaState]:
        check_tokens(x, self.dim, call)
        refuse(call, type(self).__name__, "query_positions", "key_positions")
        call = call.of_self()
        x = real_tokens(x, call.padding)
        qkv, recent = self.qkv_proj(x), None
        if self.conv is not None:
            before = None if state is None else state.recent
            qkv, recent = carried_conv(qkv, self.conv, before, call.padding)
        heads = split_heads(widened(F.silu(qkv)), 3 * self.heads)
        q, k, v = heads.chunk(3, 1)
        memory = None if state is None else state.memory
        method = DeltaRule(*self.rates(x), chunk=self.chunk)
        q = unit(q) * self.head_dim**-0.5
        result = delta(q, unit(k), v, call, method, state=memory, form=self.form)
        return self.heads_out(result.output.to(x.dtype), x), DeltaState(result.state, recent)


DELTA_NET = Card(
    name="delta_net",
    kind="layer",
    build=DeltaNet,
    papers=(
        Paper(
            "2406.06484",
            "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
            2024,
        ),
    ),
    family="recurrent",
    patterns=("causal self",),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "recalls more than linear attention from a state of the same size",
        "regard compare --task recall --mechanisms linear,delta_net",
    ),
    example=Example(options={"chunk": 5}),
    forms=("form", ("chunk", "scan")),
    deviations=("the short convolution has a bias", "keys are scaled by 1/sqrt(|k|^2 + 1e-6)"),
)
