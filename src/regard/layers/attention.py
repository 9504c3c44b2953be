r"""The standard attention layer: projections and heads around any operator.

    q, k, v = W_q x, W_k c, W_v c        y = W_o concat_h operator(q, k, v)_h        x: (B,N,C)  c =
    x or a context (B,M,C)

Layers that differ in what enters or leaves the heads override `heads_in` or `heads_out` and inherit
the rest, decoding included.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from regard.core.boundary import check_tokens
from regard.core.call import Call
from regard.core.card import Card
from regard.core.catalog import card
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal, both
from regard.core.state import Decoding, arrivals, extended, trimmed
from regard.features.rotary import Style, rotary_angles, rotate

Norm = Literal["layer", "rms"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B,N,heads*D) -> (B,heads,N,D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B,H,N,D) -> (B,N,H*D)."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention layer (B,N,C) -> (B,N,C) around an operator.

    Args:
        dim: model width C. heads: query heads H. operator: name of an operator card, with its
            `options`.
        kv_heads: key and value heads (default H). head_dim: D (default C/H). rope: rotary style or
            None.
        qk_norm: norm over D on q and k. bias: on q, k, v; out_bias: on the output projection
            (default: as bias).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        operator: str = "softmax",
        options: Mapping[str, Any] | None = None,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: Style | None = None,
        qk_norm: Norm | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__()
        _check_widths(dim, heads, kv_heads, head_dim)
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads or heads
        self.head_dim = head_dim or dim // heads
        self.rope: Style | None = rope
        self.card, self.options = card(operator), dict(options or {})
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(
            heads * self.head_dim, dim, bias=bias if out_bias is None else out_bias
        )
        self.q_norm, self.k_norm = _norm(qk_norm, self.head_dim), _norm(qk_norm, self.head_dim)
        self.inner = bind_card(self.card, heads, self.head_dim, self.options)
        self.own_mask = (
            self.card.mask(**_accepted(self.card.mask, self.options)) if self.card.mask else None
        )

    def heads_in(self, x: Tensor, context: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q (B,H,N,D) from x (B,N,C), k and v (B,H_k,M,D) from the context (B,M,C); positions come
        with the call.
        """
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        k = self.k_norm(split_heads(self.k_proj(context), self.kv_heads))
        v = split_heads(self.v_proj(context), self.kv_heads)
        if self.rope is None:
            return q, k, v
        queries, keys = call.positions(x.shape[1], context.shape[1], x.device)
        q = rotate(q, rotary_angles(queries, self.head_dim)[:, None], self.rope)
        return q, rotate(k, rotary_angles(keys, self.head_dim)[:, None], self.rope), v

    def heads_out(self, o: Tensor, x: Tensor, call: Call) -> Tensor:
        """Output (B,N,C) from head outputs o (B,H,N,D); x is the layer's input."""
        return self.o_proj(join_heads(o))

    def forward(self, x: Tensor, call: Call = Call(), context: Tensor | None = None) -> Tensor:
        """x (B,N,C) -> (B,N,C); cross attention reads keys and values from `context` (B,M,C)."""
        check_tokens(x, self.dim, call, context)
        call = call.of_self() if context is None else call
        x, source = (
            real_tokens(x, call.query_padding),
            real_tokens(x if context is None else context, call.padding),
        )
        q, k, v = self.heads_in(x, source, call)
        return self.heads_out(self.inner(q, k, v, call).output, x, call)

    def step(
        self, x: Tensor, state: Decoding | None, call: Call = Call(mask=Causal())
    ) -> tuple[Tensor, Decoding]:
        """Causal decoding: new tokens x (B,T,C) after `state` (None at the start) -> (B,T,C) and
        the state after them.

        call.padding (B,T) marks which of the new tokens are real.
        """
        if not self.card.causal:
            raise UnsupportedError(self.card.name, "it has no causal form, so it cannot decode")
        check_tokens(x, self.dim, call)
        positions, real, seen = arrivals(x, call, None if state is None else state.seen)
        x = real_tokens(x, real)
        new = call.but(
            padding=real, query_padding=real, query_positions=positions, key_positions=positions
        )
        q, k, v = self.heads_in(x, x, new)
        carried = None if state is None else state.inner
        if self.card.carries_state:
            result = self.inner(q, k, v, new, state=carried)
            return self.heads_out(result.output, x, new), Decoding(seen, result.state)
        keys = extended(carried, k, v, positions, real)
        cached = new.but(padding=keys.real, key_positions=keys.positions, step=0)
        o = self.inner(q, keys.k, keys.v, cached).output
        return self.heads_out(o, x, new), Decoding(
            seen, trimmed(keys, both(call.mask, self.own_mask), seen, self.heads, call)
        )


def real_tokens(x: Tensor, padding: Tensor | None) -> Tensor:
    """x (B,N,C) with padded tokens set to zero, so that NaN in padding cannot enter a projection's
    gradient.
    """
    return x if padding is None else x.masked_fill(~padding[..., None], 0.0)


def bind_card(entry: Card, heads: int, head_dim: int, options: Mapping[str, Any]) -> Any:
    """A callable (q, k, v, call) for an operator card: a module if it has parameters, else a
    partial function.
    """
    build = entry.build
    if isinstance(build, type) and issubclass(build, nn.Module):
        return build(heads=heads, head_dim=head_dim, **options)
    return partial(build, **options)


def _accepted(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def _norm(kind: Norm | None, width: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-6)


def _check_widths(dim: int, heads: int, kv_heads: int | None, head_dim: int | None) -> None:
    if dim < 1 or heads < 1:
        raise ArgumentError("dim, heads", "positive integers", (dim, heads))
    if head_dim is None and dim % heads:
        raise ArgumentError("heads", f"a divisor of dim={dim} (or give head_dim)", heads)
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ArgumentError("kv_heads", f"a divisor of heads={heads}", kv_heads)
