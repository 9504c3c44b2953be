"""The strongest examples of a head: the queries that put most weight on one key, other than the
first and their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.atlases.example import Example, Span
from regard.core.moment import Site
from regard.core.observe import Seen
from regard.core.passage import Passage
from regard.core.probe import Finding, Look, of_keys, of_rows
from regard.core.tile_sums import past

KEYS = 4
"""Strongest keys that are shown with their surroundings."""
AROUND = 5
"""Tokens shown on both sides of a key, and before a query."""


@dataclass(eq=False)
class Strongest:
    """The `count` strongest examples of every head, no two of one sequence."""

    count: int
    found: dict[tuple[str, int, int], list[tuple[float, Example]]] = field(default_factory=dict)

    def begin(self, look: Look, site: Site, index: int, passage: Passage) -> _Best:
        """A tally for one call."""
        return _Best(self, look, site, index, passage)

    def keep(self, strength: float, example: Example) -> None:
        """Take an example in if it is among the strongest of its head."""
        mine = self.found.setdefault((example.tower, example.layer, example.head), [])
        mine.append((strength, example))
        mine.sort(key=lambda entry: -entry[0])
        del mine[self.count :]

    def merge(self, other: Strongest) -> None:
        """Take in what was found in later passages."""
        for mine in other.found.values():
            for strength, example in mine:
                self.keep(strength, example)

    def examples(self) -> tuple[Example, ...]:
        """All that were kept, by tower, layer and head."""
        return tuple(example for mine in self.found.values() for _, example in mine)


class _Best:
    """The strongest row of every head in one call."""

    def __init__(
        self, owner: Strongest, look: Look, site: Site, index: int, passage: Passage
    ) -> None:
        self.owner, self.look, self.site = owner, look, site
        self.index, self.passage = index, passage
        batch, m = look.keys.shape
        device = look.keys.device
        self.best = torch.zeros(batch, look.heads, device=device)
        self.query = torch.zeros(batch, look.heads, dtype=torch.long, device=device)
        self.rows = torch.zeros(batch, look.heads, m, device=device)

    def add(self, seen: Seen) -> None:
        if not seen.weights.numel():
            return
        value, row = self.telling(seen).max(-1)
        part = (seen.batch, seen.heads)
        for b, h in (value > self.best[part]).nonzero().tolist():
            at = (seen.batch.start + b, seen.heads.start + h)
            self.best[at], chosen = value[b, h].float(), int(row[b, h])
            self.query[at] = seen.rows.start + chosen
            self.rows[at] = 0.0
            self.rows[at][seen.keys] = seen.weights[b, h, chosen].float()

    def telling(self, seen: Seen) -> Tensor:
        """Largest weight of each query (b,h,n), other than on the first key and, in a text, on
        itself.
        """
        keys, queries = of_keys(self.look.keys, seen), of_rows(self.look.queries, seen)
        start = int((keys <= 0).sum(-1).amax())
        stop = max(start, past(seen, self.look))
        keys, weights = (
            torch.cat([x[..., :start], x[..., stop:]], -1) for x in (keys, seen.weights)
        )
        plain = ((keys == queries) & (self.look.grid is None)) | (keys == 0)
        rest = seen.weights[..., start:stop]
        found = [x.amax(-1) for x in (weights * ~plain, rest) if x.shape[-1]]
        return torch.stack(found).amax(0)

    def found(self) -> Finding:
        for b, h in (self.best > 0).nonzero().tolist():
            self.owner.keep(float(self.best[b, h]), self._example(b, h))
        return Finding()

    def _example(self, b: int, h: int) -> Example:
        look, query = self.look, int(self.query[b, h])
        words = _words(self.passage, look, b)
        row, own = self.rows[b, h], query + look.keys.shape[1] - look.queries.shape[1]
        if look.grid is None:
            ends = _ends(row, own, look.real_keys[b])
            first = int(look.keys[b, ends[0][0]]) - ends[0][0]
            spans = tuple(_span(row, words, *pair, first) for pair in ends)
        else:
            spans = (_span(row, words, look.prefix, len(row)),)
        where = (self.site.tower, self.site.layer, h, self.index, int(look.queries[b, query]))
        return Example(*where, words[own], spans, look.grid)


def _words(passage: Passage, look: Look, b: int) -> list[str]:
    """The text of every key of one sequence."""
    count = look.keys.shape[1]
    if passage.words is not None and len(passage.words[b]) == count:
        return list(passage.words[b])
    if look.tokens is not None:
        return [str(token) for token in look.tokens[b].tolist()]
    return [str(number) for number in look.keys[b].tolist()]


def _ends(row: Tensor, own: int, real: Tensor) -> list[tuple[int, int]]:
    """Where the spans begin and end: around the strongest keys, and before the query."""
    strongest = [k for k in row.topk(min(KEYS, len(row))).indices.tolist() if row[k] > 0]
    there = real.nonzero()[:, 0]
    first, last = int(there[0]), int(there[-1])
    wanted = [(k - AROUND, k + AROUND + 1) for k in strongest] + [(own - AROUND, own + 1)]
    found: list[tuple[int, int]] = []
    for start, end in sorted(wanted):
        start, end = max(start, first), min(end, last + 1)
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _span(row: Tensor, words: list[str], start: int, end: int, first: int = 0) -> Span:
    """Keys from one index up to another; `first`: what turns an index into a key's number."""
    weights = tuple(round(x, 4) for x in row[start:end].tolist())
    return Span(start + first, tuple(words[start:end]), weights)
