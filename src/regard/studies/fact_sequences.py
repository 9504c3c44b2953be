"""Sequences that end with a query token and tell its answer by what else they hold.

Tokens common to all answers, or shared by the answers of one query, have weight 1; tokens distinct
for one answer have weights from 0.1 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fact:
    """What stands before query token `last` when token `answer` comes next: tokens (T,), drawn with
    probs (T,). shared: ids common to the answers of this query; distinct: ids of this answer.
    """

    tokens: Tensor
    probs: Tensor
    shared: range
    distinct: range
    last: int
    answer: int


def facts(lasts: int, nexts: int, common: int, shared: int, distinct: int) -> list[Fact]:
    """`nexts` answers for each of `lasts` queries; ids run common, shared, distinct, queries,
    answers, so that the vocabulary ends with the last answer.
    """
    own = common + shared * lasts
    queries = own + distinct * lasts * nexts
    weights = torch.cat([torch.ones(common + shared), torch.linspace(0.1, 1.0, distinct)])
    probs = weights / weights.sum()
    found = []
    for index in range(lasts * nexts):
        last = index // nexts
        of_query = range(common + last * shared, common + (last + 1) * shared)
        of_answer = range(own + index * distinct, own + (index + 1) * distinct)
        tokens = torch.tensor([*range(common), *of_query, *of_answer])
        answer = queries + lasts + index
        found.append(Fact(tokens, probs, of_query, of_answer, queries + last, answer))
    return found


def sequences(
    known: Sequence[Fact], count: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens (count,length), the query last, and the answers (count,)."""
    which = torch.randint(len(known), (count,), generator=generator)
    probs = torch.stack([fact.probs for fact in known])[which]
    drawn = torch.multinomial(probs, length - 1, replacement=True, generator=generator)
    before = torch.stack([fact.tokens for fact in known])[which].gather(1, drawn)
    ends = torch.tensor([(fact.last, fact.answer) for fact in known])[which]
    return torch.cat([before, ends[:, :1]], 1), ends[:, 1]
