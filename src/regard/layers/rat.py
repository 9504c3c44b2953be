r"""RAT: a gated running mean of keys and values inside chunks, softmax attention over chunk ends.

    k~_t = g_t ⊙ k~_{t-1} + (1 - g_t) ⊙ k_t        v~ likewise; both start at 0 in each chunk of L
    y_t = softmax over {k~ at the ends of earlier chunks} and {k~_t} of q_t . k~ / sqrt(D), times v~
    out = W_o (z_t ⊙ y_t)        z = sigmoid(W_z x)  g = sigmoid(W_g x + b)  x: (B,N,C)

q and k have G groups, head h uses group h mod G; the gate g (B,N,C) makes the heads' keys differ.
Queries and keys turn by rotary angles of the chunk's number. L = N is a gated recurrent network,
g = 0 with L = 1 softmax attention. A decoder keeps one key and value per finished chunk and the
running pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.merge import merge
from regard.core.recurrent import is_causal
from regard.core.scored import attend
from regard.core.state import Decoding, Keys, arrivals, extended
from regard.core.weights import Scored, scale_of
from regard.features.chunk_means import chunk_means
from regard.features.rotary import rotary_angles, rotate
from regard.layers.attention import join_heads, real_tokens, split_heads
from regard.layers.block import Block


@dataclass(frozen=True, eq=False)
class Chunks:
    """Decode state: keys and values at the ends of finished chunks, whose position is the chunk's
    number, and the running pair [k~, v~] (B,2C) of the unfinished one.
    """

    ends: Keys
    running: Tensor


class Rat(nn.Module):
    """RAT layer, causal, (B,N,C) -> (B,N,C).

    Args:
        dim: C. heads: H, D = C/H even. chunk: L. groups: G, a divisor of H.
    """

    def __init__(self, dim: int, heads: int, *, chunk: int = 16, groups: int = 1) -> None:
        super().__init__()
        if dim % heads or chunk < 1 or groups < 1 or heads % groups:
            raise ArgumentError(
                "dim, heads, chunk, groups",
                "heads | dim, 1 <= chunk, groups | heads",
                (dim, heads, chunk, groups),
            )
        self.dim, self.heads, self.chunk, self.groups = dim, heads, chunk, groups
        self.widths = [dim, dim, dim, *[dim // heads * groups] * 2]  # of z, v, g, q and k
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        memory = torch.empty(dim).uniform_(1.0, max(chunk - 1, 1))  # tokens a channel remembers
        self.gate_bias = nn.Parameter(memory.log())

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """x (B,N,C) -> (B,N,C), causal self-attention."""
        return self._advance(x, None, call)[0]

    def step(
        self, x: Tensor, state: Decoding | None, call: Call = Call(mask=Causal())
    ) -> tuple[Tensor, Decoding]:
        """Causal decoding: new tokens x (B,T,C) after `state` -> (B,T,C) and the state after."""
        y, ends, last, seen = self._advance(x, state, call)
        kept = ends.real.any(0)
        ends = Keys(
            ends.k[:, :, kept], ends.v[:, :, kept], ends.positions[:, kept], ends.real[:, kept]
        )
        return y, Decoding(seen, Chunks(ends, last))

    def _advance(
        self, x: Tensor, state: Decoding | None, call: Call
    ) -> tuple[Tensor, Keys, Tensor, Tensor]:
        """Output, the ends of all chunks so far, the running pair (B,2C), and the tokens seen."""
        check_tokens(x, self.dim, call)
        refuse(call, "rat", "query_positions", "key_positions")
        if not is_causal(call, "rat"):
            raise UnsupportedError("rat", "its chunks run from past to present (mask=Causal())")
        positions, real, seen = arrivals(x, call, None if state is None else state.seen)
        before = torch.zeros_like(seen) if state is None else state.seen
        z, v, g, q, k = self.in_proj(real_tokens(x, real)).split(self.widths, -1)
        gate = (g + self.gate_bias).sigmoid()
        pair = torch.cat([k.tile(self.heads // self.groups), v], -1)
        first = before // self.chunk  # number of the chunk that the first new token belongs to
        room = x.shape[1] if state is None else x.shape[1] + self.chunk - 1
        chunks = max(-(-room // self.chunk), 1)
        slots = (positions - first[:, None] * self.chunk).masked_fill(~real, chunks * self.chunk)
        start = None if state is None else state.inner.running
        means = chunk_means(pair, gate.tile(2), slots, (chunks, self.chunk), start)
        numbers = first[:, None] + torch.arange(chunks, device=x.device)
        done = (numbers + 1) * self.chunk <= seen[:, None]
        k_ends, v_ends = self._pair(means[:, :, -1], numbers)
        ends = extended(None if state is None else state.inner.ends, k_ends, v_ends, numbers, done)
        own = _rows(means.flatten(1, 2), slots)
        y = self._attend(q, own, positions // self.chunk, ends, call)
        unfinished = seen % self.chunk != 0
        last = _rows(means[:, :, -1], (seen // self.chunk - first)[:, None])[:, 0]
        return self.out_proj(z.sigmoid() * y), ends, last * unfinished[:, None], seen

    def _pair(self, means: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, turned by their chunk's number (B,n), and values, both (B,H,n,D)."""
        k, v = (split_heads(x, self.heads) for x in means.chunk(2, -1))
        return rotate(k, rotary_angles(numbers, k.shape[-1])[:, None]), v

    def _attend(self, q: Tensor, own: Tensor, numbers: Tensor, ends: Keys, call: Call) -> Tensor:
        """Softmax over the ends of earlier chunks and the token's own pair, (B,T,C)."""
        k, v = self._pair(own, numbers)
        q = split_heads(q, self.groups).tile(1, self.heads // self.groups, 1, 1)
        q = rotate(q, rotary_angles(numbers, k.shape[-1])[:, None])
        earlier = Call(
            mask=Causal(),
            padding=ends.real,
            query_positions=numbers,
            key_positions=ends.positions + 1,  # a chunk is seen from the next one on
            scale=call.scale,
        )
        far = attend(q, ends.k, ends.v, earlier, Scored(), need_lse=True)
        near = Result(v, (q * k).sum(-1) * scale_of(call, None, k.shape[-1]))
        return join_heads(merge([far, near]).output)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B,n,W) at index (B,T), the last one where the index is too large."""
    index = index.clamp(max=x.shape[1] - 1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def convert(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Block:
    """Our block (RMS norm, RAT, residual) with the authors' weights."""
    dim, heads = config["d_model"], config["num_head"]
    mixer = Rat(dim, heads, chunk=config["chunk_size"], groups=config["ngroups"])
    ours = Block(dim, mixer, norm=partial(nn.RMSNorm, eps=1e-6))
    own = {
        ("norm1.weight" if n == "input_norm.weight" else f"mixer.{n}"): w
        for n, w in weights.items()
    }
    ours.load_state_dict(own)
    return ours


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The block's output."""
    block = convert(case["config"], case["state_dict"])
    return {"y": block(case["inputs"]["x"], Call(mask=Causal()))}


RAT = Card(
    name="rat",
    kind="layer",
    build=Rat,
    papers=(
        Paper(
            "2507.04416",
            "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling",
            2025,
        ),
    ),
    family="recurrent",
    patterns=("causal self",),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls like softmax with a cache of one key per chunk",
        "regard compare --task recall --mechanisms softmax,rat",
    ),
    example=Example(dim=16, options={"chunk": 2, "groups": 2}),
    goldens=(
        Golden(
            file="58_rat.pt",
            replay=replay,
            source="CLAIRE-Labo/RAT:src/model/backbone/rat/rat_slow.py",
            commit="d4a8f54",
        ),
    ),
    convert=convert,
)
