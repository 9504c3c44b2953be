r"""Scan and snap: one attention layer first lets go of tokens that every answer shares and of rare
ones, then freezes with several left.

    c = sum_t softmax_t(Z[q, x_t]) e(x_t)        logits = Y c / |c|        loss: next token

A sequence x (L) ends with its query q; the tokens before it are drawn from p(. | q, next): common
tokens of weight 1, and tokens distinct for that answer, of weights from 0.1 to 1. Y and Z (M,M)
start at zero and are trained by gradient descent with momentum 0.9. The share of a token in
expectation is c(x) ~ p(x | q, next) exp Z[q, x].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.operators.softmax import softmax
from regard.studies.fact_sequences import Fact, facts, sequences

FACTORS = (0.5, 1.0, 3.0)
"""The run is repeated at these multiples of its rate."""


def next_token_loss(
    y: Tensor,
    z: Tensor,
    x: Tensor,
    answer: Tensor,
    *,
    normalise: bool = True,
    residual: bool = False,
    with_last: bool = False,
) -> Tensor:
    """Mean cross-entropy for x (B,L) and answer (B,) under tables y and z (M,M).

    normalise: divide c by its length. residual: add the query's own one-hot. with_last: the query
    may attend to itself.
    """
    tokens = F.one_hot(x, len(z)).to(z.dtype)
    seen = (tokens if with_last else tokens[:, :-1])[:, None]
    queries = z[x[:, -1]][:, None, None]
    c = softmax(queries, seen, seen, Call(scale=1.0)).output[:, 0, 0]
    if residual:
        c = c + tokens[:, -1]
    if normalise:
        c = c / c.norm(dim=1, keepdim=True)
    return F.cross_entropy(c @ y.T, answer)


def shares(z: Tensor, fact: Fact) -> Tensor:
    """Expected share of attention of each token of a fact (…,T), under tables z (…,M,M)."""
    mass = fact.probs * z[..., fact.last, fact.tokens].exp()
    return mass / mass.sum(-1, keepdim=True)


@dataclass(frozen=True)
class ScanAndSnap:
    """Train the two tables and follow where attention goes.

    Args:
        lasts, nexts: query tokens, and answers of each. common, distinct: tokens that all answers
            share, and tokens of one answer. length, batch: of the sequences. steps: of training.
            rate: learning rate of both tables. seed: of the data.
    """

    lasts: int = 2
    nexts: int = 1
    common: int = 10
    distinct: int = 10
    length: int = 128
    batch: int = 128
    steps: int = 100
    rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.lasts, self.nexts, self.common, self.batch, self.steps) < 1:
            raise ArgumentError("lasts, nexts, common, batch, steps", "at least 1", self)
        if min(self.distinct, self.length) < 2:
            raise ArgumentError("distinct, length", "at least 2", self)

    def run(self, progress: Progress) -> Outcome:
        known = facts(self.lasts, self.nexts, self.common, 0, self.distinct)
        runs = [self._train(known, index, progress) for index in range(len(FACTORS))]
        losses, tables = runs[FACTORS.index(1.0)]
        path = torch.stack([shares(tables, fact) for fact in known])  # (facts, steps + 1, T)
        left = [self._left(known, z[-1]) for _, z in runs]
        figures = self._figures(losses[-1], path.mean(0), tables, left)
        picture = Map(
            "Shares of the first answer's tokens: common ones, then distinct ones by frequency",
            "token",
            "step",
            path[0].T.tolist(),
        )
        return Outcome(
            (*figures, _order(known, tables[-1])), self._curves(losses, path.mean(0)), (picture,)
        )

    def _figures(
        self, loss: float, path: Tensor, tables: Tensor, left: list[Tensor]
    ) -> tuple[Figure, ...]:
        common = path[:, : self.common].sum(-1)
        late = tables[-max(1, self.steps // 5) - 1]
        moved = float((tables[-1] - late).norm() / tables[-1].norm())
        top = float(left[FACTORS.index(1.0)].amax(-1).mean())
        slow, *_, fast = (float(-torch.special.xlogy(x, x).sum(-1).mean()) for x in left)
        dropped, frozen = "common tokens are dropped: below 1", "attention freezes: near 0"
        several = "no winner takes all: well below 1"
        spread = "a larger rate leaves fewer tokens: 1.97 nats at 0.5, 1.55 at 3 in the paper"
        return (
            Figure("loss", loss, "falls from 3.5 to below 0.001", high=0.01),
            Figure("common share, end/start", float(common[-1] / common[0]), dropped, high=0.9),
            Figure("movement of the last fifth", moved, frozen, high=0.01),
            Figure("largest distinct share", top, several, high=0.5),
            Figure("entropy, slow less fast", slow - fast, spread, low=0.05),
        )

    def _train(
        self, known: Sequence[Fact], index: int, progress: Progress
    ) -> tuple[list[float], Tensor]:
        """Losses at a multiple of the rate, and the attention table before, between and after the
        steps (steps+1,M,M).
        """
        generator = torch.Generator().manual_seed(self.seed)
        size = known[-1].answer + 1
        y, z = (torch.zeros(size, size, requires_grad=True) for _ in range(2))
        optimiser = torch.optim.SGD([y, z], lr=FACTORS[index] * self.rate, momentum=0.9)
        losses, tables = [], [z.detach().clone()]
        for step in range(self.steps):
            x, answer = sequences(known, self.batch, self.length, generator)
            loss = next_token_loss(y, z, x, answer)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            tables.append(z.detach().clone())
            progress((index + (step + 1) / self.steps) / len(FACTORS))
        return losses, torch.stack(tables)

    def _left(self, known: Sequence[Fact], z: Tensor) -> Tensor:
        """Shares among the distinct tokens alone (facts, distinct), summing to one."""
        found = torch.stack([shares(z, fact)[self.common :] for fact in known])
        return found / found.sum(-1, keepdim=True)

    def _curves(self, losses: list[float], path: Tensor) -> tuple[Curve, ...]:
        lines = {
            "all common tokens": path[:, : self.common].sum(-1),
            "most frequent distinct token": path[:, -1],
            "rarest distinct token": path[:, self.common],
        }
        drawn = {name: list(enumerate(line.tolist())) for name, line in lines.items()}
        return (
            Curve("Loss", "step", "loss", {"loss": list(enumerate(losses))}),
            Curve("Where attention goes", "step", "share", drawn),
        )


def _order(known: Sequence[Fact], z: Tensor) -> Figure:
    """In how many pairs of distinct tokens the more frequent one has the larger logit."""
    values = torch.stack([z[fact.last, list(fact.distinct)] for fact in known])
    rare, frequent = torch.triu_indices(values.shape[-1], values.shape[-1], 1)
    share = (values[..., frequent] > values[..., rare]).float().mean()
    wanted = "of two distinct tokens the more frequent one gains more: 1"
    return Figure("pairs in order", float(share), wanted, low=0.9)


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' losses and gradients (the second run flips every switch), and their facts."""
    config, outputs = case["config"], {}
    switches = [config[name] for name in ("normalize", "residual", "attn_include_base_token")]
    for run in range(2):
        weights = case["state_dict"][f"sd{run}"]
        y, z = (weights[f"K{i}.weight"].clone().requires_grad_() for i in (1, 2))
        scale, residual, with_last = (on != bool(run) for on in switches)
        x, answer = case["inputs"]["x"], case["inputs"]["label"]
        loss = next_token_loss(
            y, z, x, answer, normalise=scale, residual=residual, with_last=with_last
        )
        grads = torch.autograd.grad(loss, (y, z))
        outputs |= {f"loss{run}": loss, f"gK1_{run}": grads[0], f"gK2_{run}": grads[1]}
    names = ("num_last", "num_next_per_last", "common", "common_per_last", "unique")
    said = dict(re.findall(r"(\w+)[ =](\d+)", case["notes"]))
    known = facts(*(int(said[name]) for name in names))
    return outputs | {"M": known[-1].answer + 1, "facts": [_published(fact) for fact in known]}


def _published(fact: Fact) -> dict[str, Any]:
    return {
        "probs": fact.probs,
        "tokens": fact.tokens,
        "common_per_last_range": (fact.shared.start, fact.shared.stop),
        "unique_range": (fact.distinct.start, fact.distinct.stop),
        "last_token": fact.last,
        "next_token": fact.answer,
    }


CARD = StudyCard(
    name="scan_and_snap",
    build=ScanAndSnap,
    papers=(
        Paper(
            "2305.16380",
            "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer "
            "Transformer",
            2023,
        ),
    ),
    claim=Claim(
        "attention leaves common tokens, orders the others by frequency, and freezes",
        "regard study scan_and_snap",
    ),
    seconds=3,
    small={"length": 12, "batch": 8, "steps": 6, "common": 3, "distinct": 4},
    goldens=(
        Golden(
            "86_scan_snap.pt", replay, "https://github.com/facebookresearch/luckmatters", "625b5f7"
        ),
    ),
)
