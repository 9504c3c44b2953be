r"""Stream: a head keeps only the first `sinks` tokens and the `recent` newest ones, evicted at each
step.

    keep_j = j < sinks  or  j > t - recent        t: the newest token, j: a key's position

With `window=True` every query, of the prompt too, sees the first `sinks` tokens and the last
`recent`, its own among them, so the whole call costs O(N (sinks + recent)); otherwise the prompt is
attended in full and only the cache is cut, to which the next token adds its own key.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.model_scores import attend_through
from regard.core.moment import Held, Moment
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.importance.recency import kept_near, seen_near
from regard.operators.sliding_window import window_with_sinks


@dataclass(frozen=True)
class Stream(Treatment):
    """sinks, recent: tokens kept at the start and the end. budget: instead of `recent`, the
    fraction of the tokens seen that may stay, sinks included. window: read the prompt so, too.
    """

    sinks: int = 4
    recent: int | None = None
    budget: float | None = None
    window: bool = False

    def __post_init__(self) -> None:
        if (self.recent is None) == (self.budget is None):
            raise ArgumentError("recent, budget", "exactly one of the two", self)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ArgumentError("budget", "a fraction in (0, 1]", self.budget)
        if self.sinks < 0 or (self.recent is not None and self.recent < 1):
            raise ArgumentError("sinks, recent", "sinks >= 0 and recent >= 1", self)
        if self.window and self.recent is None:
            raise ArgumentError("window", "a number of recent tokens", self)

    @property
    def neutral(self) -> bool:
        return self.budget == 1.0

    def attention(self, at: Moment) -> Tensor | None:
        if not self.window or at.call is None or self.recent is None:
            return None
        if at.q.shape[2] == 1 and at.k.shape[2] <= self.sinks + self.recent:
            return None
        return attend_through(at, at.call, window_with_sinks(self.recent, self.sinks))

    def visible(self, at: Moment) -> Tensor | None:
        if not self.window or at.call is not None or at.q.shape[2] == 1 or self.recent is None:
            return None
        return seen_near(at, self.recent, self.sinks)

    def keep(self, held: Held) -> Tensor:
        if self.window and self.recent is not None:
            return kept_near(held, self.recent, self.sinks)
        length = held.length[:, None, None]
        if self.recent is None:
            total = (length * (self.budget or 1.0)).long()
            recent = (total - self.sinks).clamp_min(1)
        else:
            recent = self.recent
        return (held.positions < self.sinks) | (held.positions >= length - recent)


CARD = TreatmentCard(
    name="stream",
    build=Stream,
    papers=(Paper("2309.17453", "Efficient Streaming Language Models with Attention Sinks", 2023),),
    claim=Claim(
        "perplexity holds with a few sinks and a window; distant facts are lost",
        "regard evaluate --plan stream.json --task perplexity,needle",
    ),
    example=Trial({"sinks": 2, "recent": 6}),
    neutral={"budget": 1.0},
    limits=(Coincides({"sinks": 0, "recent": 10_000, "window": True}),),
)
