r"""Landmark attention: a landmark token at the end of each block stands for it, and the weight the
landmark earns is shared out among the tokens of its block.

    Z_i = softmax over {tokens of the own block} and {landmarks of finished blocks} of s_ij
    a_ij = Z_i(j) in the own block
    a_ij = Z_i(landmark of b) softmax_{j in b}(s_ij) in a finished block b
    o_i = sum_j a_ij v_j

s_ij = q_i . k_j / sqrt(D), q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E). Landmarks themselves weigh
nothing, rows sum to one. A landmark as a query belongs to the block it closes. Landmarks are the
keys that call.roles["landmark"] (B,M) marks, else every (block+1)-th position. With `retrieve` a
query reads only the blocks of its best landmarks.

Differs from the paper: a finished block of which a query may see no token is left out of Z, where
the published code lets its share of the weight vanish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.scored import attend
from regard.core.selected import choose
from regard.core.weights import Scored, Softmax


def landmark(
    q: Tensor, k: Tensor, v: Tensor, call: Call, *, block: int = 50, retrieve: int | None = None
) -> Result:
    """Landmark attention; needs a mask that tells before from after, such as Causal()."""
    check_qkv(q, k, v, call)
    if block < 1:
        raise ArgumentError("block", "at least 1 token between landmarks", block)
    if call.mask is None:
        raise UnsupportedError("landmark", "its blocks close one after another: give a causal mask")
    rule = GroupedSoftmax(_landmarks(q, k, call, block), retrieve)
    return attend(q, k, v, call, Scored(normalise=rule), impl="dense")


def _landmarks(q: Tensor, k: Tensor, call: Call, block: int) -> Tensor:
    """Which keys are landmarks, (B or 1, M)."""
    marked = call.roles.get("landmark")
    if marked is None:
        keys = call.positions(q.shape[2], k.shape[2], k.device)[1]
        marked = keys % (block + 1) == block
    elif marked.dtype != torch.bool or tuple(marked.shape) != (k.shape[0], k.shape[2]):
        shape = (k.shape[0], k.shape[2])
        raise ArgumentError("call.roles['landmark']", f"a boolean tensor {shape}", marked)
    return marked if call.padding is None else marked & call.padding


@dataclass(frozen=True, eq=False)
class GroupedSoftmax:
    """The normaliser of landmark attention. is_landmark: (B or 1, M), keys in sequence order.

    retrieve: finished blocks a query reads, the best by landmark score (None: all).
    """

    is_landmark: Tensor
    retrieve: int | None = None
    kind: Literal["two_pass"] = "two_pass"

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        """Weights (B,H,N,M) of scores (B,H,N,M)."""
        if not scores.numel():
            return scores
        block, is_own, finished = _blocks(self.is_landmark, visible)
        block, mark = block.expand(scores.shape), self.is_landmark[:, None, None]
        shares, filled = _softmax_in_blocks(scores, finished & ~mark, block)
        doors = finished & mark & filled
        if self.retrieve is not None:
            doors = doors & choose(scores, doors, self.retrieve).mask(scores.shape[-1])
        entered = (is_own & ~mark) | doors
        first = Softmax()(scores, entered, entered.sum(-1, keepdim=True))
        mass = torch.zeros_like(scores).scatter_add(-1, block, first * doors).gather(-1, block)
        return first * is_own + mass * shares


def _blocks(is_landmark: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of each key's block (B or 1,1,1,M), and which visible keys stand in the query's own
    block, the last one it sees, or in a finished one.
    """
    number = (is_landmark.cumsum(-1) - is_landmark.long())[:, None, None]
    last = number.masked_fill(~visible, -1).amax(-1, keepdim=True)
    return number, visible & (number == last), visible & (number != last)


def _softmax_in_blocks(scores: Tensor, counted: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of counted scores (B,H,N,M) within each block of keys, and where a key's block has
    any.
    """
    low = scores.detach().masked_fill(~counted, float("-inf"))
    top = torch.full_like(low, float("-inf")).scatter_reduce(-1, block, low, "amax")
    shifted = scores - top.gather(-1, block).nan_to_num(neginf=0.0)
    raised = shifted.masked_fill(~counted, float("-inf")).exp()
    total = torch.zeros_like(raised).scatter_add(-1, block, raised).gather(-1, block)
    return raised / total.masked_fill(total == 0, 1.0), total > 0


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    scores, is_landmark = case["inputs"]["scores"], case["inputs"]["is_landmark"]
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()[None, None]
    probs = GroupedSoftmax(is_landmark)(scores, visible, visible.sum(-1, keepdim=True))
    slots = case["outputs"]["group_prob"].shape[-1]
    block, is_own, _ = _blocks(is_landmark, visible)
    slot = torch.where(is_own, slots - 1, block).expand(probs.shape)  # own block: the last slot
    group_prob = probs.new_zeros(*probs.shape[:-1], slots).scatter_add(-1, slot, probs)
    return {"probs": probs, "group_prob": group_prob}


LANDMARK = Card(
    name="landmark",
    kind="operator",
    build=landmark,
    papers=(
        Paper(
            "2305.16300",
            "Landmark Attention: Random-Access Infinite Context Length for Transformers",
            2023,
        ),
    ),
    family="scored",
    patterns=("causal self", "causal cross"),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls as softmax does through the landmarks, after somewhat more training",
        'regard compare --mechanisms "softmax,landmark(block=7)" --steps 600',
    ),
    example=Example(options={"block": 3}),
    limits=(Limit({"block": 10**6}, "softmax"),),
    goldens=(
        Golden(
            "109_landmark_softmax.pt",
            _replay,
            "epfml/landmark-attention:lm_benchmark/models/landmark.py",
            "d963e504fa",
        ),
    ),
    deviations=(
        "landmarks are positions or a role given in the call; inserting tokens is the data's part",
        "retrieved blocks keep their own positions",
    ),
)
