r"""Heavy hitters: each head keeps the keys that received most attention so far, and the newest.

    mass_j = sum_i A_ij over every query i so far        A: softmax weights of the keys still there
    keep   = the last `recent` keys  and  the `heavy` others of greatest mass

Judged after the prompt, with the attention of all its queries, and again after every step: what is
evicted takes its mass along. Query heads that share keys vote together, by their mean. Early keys
are seen by more queries and so gather more; `normalise` divides by how many could see the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.incoming import Chosen, Memory, bare
from regard.core.moment import Held
from regard.core.treating import treat
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.importance.observed import mass_and_viewers, ranked


@dataclass(frozen=True)
class H2O(Treatment):
    """heavy, recent: keys kept of each kind; or budget: the fraction of the tokens seen that may
    stay, one half of each kind. normalise: mass per query that could see the key.
    """

    heavy: int | None = None
    recent: int | None = None
    budget: float | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        if (self.heavy is None) != (self.recent is None) or (
            (self.heavy is None) == (self.budget is None)
        ):
            raise ArgumentError("heavy, recent, budget", "both numbers, or a budget alone", self)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ArgumentError("budget", "a fraction in (0, 1]", self.budget)
        if (self.heavy or 0) < 0 or (self.recent is not None and self.recent < 1):
            raise ArgumentError("heavy, recent", "heavy >= 0 and recent >= 1", self)

    @property
    def neutral(self) -> bool:
        return self.budget == 1.0

    def keep(self, held: Held) -> Tensor:
        mass, viewers = mass_and_viewers(held)
        score = held.marks["mass"] = mass + held.marks.get("mass", 0.0)
        if self.normalise:
            held.marks["viewers"] = viewers + held.marks.get("viewers", 0.0)
            score = score / held.marks["viewers"].clamp_min(1)
        heavy, recent = self._counts(held.length)
        newest = held.positions >= (held.length - recent)[:, None, None]
        return newest | ranked(score.masked_fill(newest | ~held.real, -1.0), heavy)

    def _counts(self, length: Tensor) -> tuple[Tensor, Tensor]:
        """Heavy and recent keys to keep, (B,) each, after `length` (B,) tokens."""
        if self.heavy is not None and self.recent is not None:
            return torch.full_like(length, self.heavy), torch.full_like(length, self.recent)
        total = (length * (self.budget or 1.0)).long()
        return total // 2, (total - total // 2).clamp_min(1)


def replay(case: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """The authors' kept keys of one golden case, after the prompt and after each step, in order of
    position, and what each step attends.
    """
    config, inputs = case["config"], case["inputs"]
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    method = H2O(heavy=config["hh_size"], recent=config["recent_size"])
    step = Chosen(0, method, tuple(range(q.shape[1])), frozenset(("prefill", "decode")))
    memory, kept, outputs = Memory(), [], []
    prompt = config["prompt"]
    for start, stop in [(0, prompt)] + [(t, t + 1) for t in range(prompt, q.shape[2])]:
        call = bare(*(x[:, :, start:stop] for x in (q, k, v)))
        phase = "prefill" if start == 0 else "decode"
        outputs.append(treat(replace(call, phase=phase, query_slot=start), [step], memory))
        slots = torch.cat([bucket.views()[2] for bucket in memory.buckets or ()], 1)
        count = int((slots[0, 0] >= 0).sum())
        kept.append(slots.sort(-1).values[..., -count:].long())
    return {
        "kept_positions_after_prompt_and_each_step": kept,
        "decode_outputs": outputs[1:],
    }


CARD = TreatmentCard(
    name="h2o",
    build=H2O,
    papers=(
        Paper(
            "2306.14048",
            "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
            2023,
        ),
        Paper(
            "2406.05678",
            "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language "
            "Models",
            2024,
        ),
    ),
    claim=Claim(
        "a few keys receive most attention, and keeping them holds perplexity at a small cache",
        "regard evaluate --plan h2o.json --plan stream.json --task perplexity,needle",
    ),
    example=Trial({"heavy": 5, "recent": 4}),
    neutral={"budget": 1.0},
    limits=(
        Coincides({"heavy": 10_000, "recent": 1}),
        Coincides({"heavy": 0, "recent": 6}, "stream", {"sinks": 0, "recent": 6}),
    ),
    goldens=(Golden("208b_h2o.pt", replay, "https://github.com/FMInference/H2O", "ac75c2a8a9"),),
)
