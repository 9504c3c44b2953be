"""How long a decoded token takes with all heads under one rule, for budgets in latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from regard.core.passage import Passage
from regard.searchers.prices import decoding_pace
from regard.searchers.rules import Group, Rule, plan_of


def paces(
    model: Any, groups: Sequence[Group], passages: Sequence[Passage]
) -> Callable[[Rule | None, int], float]:
    """Measures seconds of one decoded token after the first passage that is at least half as long
    as asked for, or the longest, with every group under a rule; None: as they are.
    """

    def pace(rule: Rule | None, length: int) -> float:
        prompts = [passage.inputs["input_ids"][:1] for passage in passages]
        longest = max(prompts, key=lambda ids: ids.shape[1])
        prompt = next((ids for ids in prompts if ids.shape[1] > length // 2), longest)
        choice = np.zeros(len(groups), dtype=np.int64)
        plan = plan_of(groups, (rule or Rule(None),), choice, name="")
        with plan.applied(model):
            return decoding_pace(model, prompt)

    return pace
