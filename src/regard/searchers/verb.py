"""`regard.search`: from a model, a budget and one's own passages to a plan."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, get_args

from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.mode import in_mode
from regard.core.passage import Passage, passage_of
from regard.searchers.fitting import Fitted, decoder_sites, fitted, sensitivity
from regard.searchers.pacing import paces
from regard.searchers.prices import prices
from regard.searchers.refining import Company, refined
from regard.searchers.rules import SHARES, RuleName, Unit, groups_of, ladder
from regard.searchers.series import Told


def search(
    model: Any,
    passages: Sequence[Passage],
    budget: float = 0.25,
    *,
    unit: Unit = "bytes",
    rule: RuleName = "spans",
    shares: Sequence[float] = SHARES,
    sinks: int = 4,
    rounds: int = 3,
    known: MutableMapping[str, float] | None = None,
    progress: Told | None = None,
) -> Fitted:
    """The plan that says what every key head keeps of its cache within a budget, so that answers
    stay as likely as they can.

    model: a decoder of transformers. passages: prompts, `inputs["input_ids"]` (B,N), with the
    `answer` (B,T) that should follow each; `scored` (B,T) says which of its tokens count. The
    budget must hold at the length of every prompt. budget: a part of the untouched model's cost in
    `unit`: keys and values held ("bytes"), tokens attended ("tokens"), multiplications of a decoded
    token ("flops"), or its seconds, as measured here ("latency"). shares: parts of its tokens that
    a key head may keep, rising. rule: which ones: the first `sinks` and the newest ("spans"), or
    those that the prompt's last tokens vote for ("snapkv"). rounds: of refinement in
    company. known: losses by key, of this model and these passages; a search that was interrupted
    goes on from what it holds. progress: called with the share that is done of what is being
    measured.

    The same arguments give the same plan, save where latency is measured. It is made for this
    model: applied to one of another shape it is refused.

    Raises:
        ArgumentError: no passage, or one without `input_ids`; a budget that cannot be met, with the
            smallest that can; a model that is no decoder; an unknown unit.
        UnsupportedError: a passage without an answer, a model without a cache.
    """
    given = [passage_of(passage) for passage in passages]
    if not given:
        raise ArgumentError("passages", "at least one", 0)
    if unit not in get_args(Unit):
        raise ArgumentError("unit", f"one of {', '.join(get_args(Unit))}", unit)
    rules, sites = ladder(rule, tuple(shares), sinks), decoder_sites(model)
    groups, known = groups_of(sites), {} if known is None else known
    with in_mode(model, False):
        pace = paces(model, groups, given)
        cost = prices(model, sites, groups, rules, lengths_of(given), unit, pace)
        cost.room(budget)  # refuses early what cannot be met
        found = sensitivity(model, given, rules, known=known, progress=progress)
        start = fitted(model, found, cost, budget)
        company = Company(model, given, found, known)
        return refined(company, start, cost, budget, rounds=rounds, progress=progress)


def lengths_of(passages: Sequence[Passage]) -> tuple[int, ...]:
    """The numbers of real tokens of all prompts, each once, rising.

    Raises:
        ArgumentError: a passage without ids of tokens.
    """
    found: set[int] = set()
    for passage in passages:
        ids = passage.inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ArgumentError("passages", "inputs with input_ids", list(passage.inputs))
        real = passage.padding
        found |= {ids.shape[1]} if real is None else set(real.sum(1).tolist())
    return tuple(sorted(found))
