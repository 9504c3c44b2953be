r"""Agent attention: a few agents read all keys, and every query reads the agents.

    o = softmax(q a^T s) softmax(a k^T s) v        a_m = mean of the queries in run m of n

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E)  a: (B,H,n,D), s = 1/sqrt(D). The product of the two
softmaxes is a matrix of rank n whose rows sum to one: linear attention whose feature maps are
softmaxes. With a (h,w) grid the queries are pooled in sqrt(n) x sqrt(n) blocks of it; prefix tokens
are not pooled.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regard.core.boundary import check_qkv, grid_of, refuse
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Paper
from regard.core.errors import ArgumentError
from regard.core.scored import attend, without_padding
from regard.core.weights import Scored, group_values
from regard.features.adaptive import adaptive_means, blocks, runs


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    agents: int = 49,
    impl: Literal["agents", "matrix"] = "agents",
) -> Result:
    """Agent attention without position biases (Han et al., section 3.2). "matrix" multiplies the
    weights to an N x M matrix first.
    """
    check_qkv(q, k, v, call)
    refuse(call, "agent_attention", "mask")
    if agents < 1:
        raise ArgumentError("agents", "at least 1", agents)
    q = without_padding(q, k, v, call)[0]
    a, found = pooled_agents(q, call, agents)
    if impl == "agents":
        return through_agents(q, k, v, a, call, found)
    if impl != "matrix":
        raise ArgumentError("impl", "'agents' or 'matrix'", impl)
    each = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    weights = through_agents(q, k, each, a, call, found).output  # (B,H,N,M)
    return Result(group_values(weights, without_padding(q, k, v, call)[2]))


def pooled_agents(q: Tensor, call: Call, agents: int) -> tuple[Tensor, Tensor | None]:
    """Agents (B,H,n,D) pooled from queries (B,H,N,D), and which of them (B,n) stand for any; None:
    all do.
    """
    real = call.query_padding
    if real is None:
        real = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    if call.grid is None or len(call.grid) == 1:
        members = runs(agents, real, call.prefix)
    else:
        members = blocks(agents, grid_of(call, 2, q.shape[2]), real, call.prefix)
    full = call.query_padding is None and q.shape[2] > call.prefix
    return adaptive_means(q, members), None if full else members.any(-1).expand(q.shape[0], -1)


def through_agents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    call: Call,
    found: Tensor | None = None,
    *,
    inward: Tensor | None = None,
    outward: Tensor | None = None,
) -> Result:
    """softmax(q a^T s + outward) softmax(a k^T s + inward) v for agents (B,H,n,D).

    found (B,n): agents that exist, None = all do. inward (H,n,M) and outward (H,N,n) are biases.
    """
    reading = Call(padding=call.padding, query_padding=found, scale=call.scale)
    telling = Call(padding=found, query_padding=call.query_padding, scale=call.scale)
    summary = attend(agents, k, v, reading, _biased(inward)).output  # (B,H,n,E)
    return Result(attend(q, agents, summary, telling, _biased(outward)).output)


def _biased(table: Tensor | None) -> Scored:
    if table is None:
        return Scored()

    def score(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return s + table[h, q_idx, kv_idx]

    return Scored(score=score, captures=(table,))


PAPER = Paper(
    "2312.08874", "Agent Attention: On the Integration of Softmax and Linear Attention", 2023
)

AGENT_ATTENTION = Card(
    name="agent_attention",
    kind="operator",
    build=agent_attention,
    papers=(PAPER,),
    family="pooled",
    patterns=("noncausal self", "noncausal cross"),
    grids=(1, 2),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "reads digits through a handful of agents",
        "regard compare --task digits --mechanisms 'softmax,agent_attention(agents=9)'",
    ),
    example=Example(options={"agents": 4}),
    forms=("impl", ("matrix", "agents")),
)
