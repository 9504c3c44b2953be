"""What a step names: attention modules by glob, layers and heads by number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from regard.core.incoming import Chosen
from regard.core.moment import Site
from regard.plan.step import Numbers, PlanError, Step


def default_sites(sites: Sequence[Site]) -> list[Site]:
    """The decoder's self-attention, or every self-attention where there is no decoder."""
    selves = [s for s in sites if not s.cross]
    return [s for s in selves if s.causal] or selves


def chosen_sites(step: Step, index: int, sites: Sequence[Site]) -> list[Site]:
    """The attention modules a step names."""
    found = default_sites(sites)
    if step.modules is not None:
        found = [s for s in sites if fnmatchcase(s.tower, step.modules) or s.name == step.modules]
    if not found:
        towers = sorted({s.tower for s in sites})
        raise PlanError(
            f"steps[{index}].modules", f"a glob that matches one of {towers}", step.modules
        )
    chosen = []
    for tower in dict.fromkeys(s.tower for s in found):
        inside = [s for s in found if s.tower == tower]
        numbers = numbers_of(step.layers, inside[0].layers, f"steps[{index}].layers")
        chosen += [s for s in inside if s.layer in numbers]
    if not chosen:
        raise PlanError(f"steps[{index}].layers", "at least one layer", step.layers)
    return chosen


def chosen_heads(step: Step, index: int, site: Site) -> tuple[int, ...]:
    """The query heads a step names in one attention module."""
    where = f"steps[{index}]"
    if step.heads is not None and step.kv_heads is not None:
        raise PlanError(f"{where}.heads", "heads or kv_heads, not both", step.heads)
    if step.kv_heads is None:
        return numbers_of("all" if step.heads is None else step.heads, site.heads, f"{where}.heads")
    keys = numbers_of(step.kv_heads, site.kv_heads, f"{where}.kv_heads")
    return tuple(k * site.group + i for k in keys for i in range(site.group))


def check_groups(chosen: Chosen, site: Site) -> None:
    """Raise PlanError if a step on the cache splits a group of heads that share keys, or one that
    leaves sub-layers out is to do so in one phase only.
    """
    if chosen.touches("removes") and len(chosen.phases) < 2:
        raise PlanError(
            f"steps[{chosen.index}].phases", "both phases for what is left out", chosen.phases
        )
    keys = {h // site.group for h in chosen.heads}
    if chosen.touches("keep") and len(keys) * site.group != len(chosen.heads):
        raise PlanError(
            f"steps[{chosen.index}].heads",
            f"whole groups of {site.group} query heads (or kv_heads), which share their keys",
            list(chosen.heads),
        )


def check_phases(chosen: Chosen, site: Site) -> None:
    """Raise PlanError if a step names a phase that its treatment cannot serve on this module."""
    lacking = chosen.phases - chosen.treatment.serves
    if lacking and site.causal:
        raise PlanError(
            f"steps[{chosen.index}].phases",
            f"at most {sorted(chosen.treatment.serves)}, which is all this treatment can serve",
            sorted(chosen.phases),
        )


def numbers_of(spec: Numbers, count: int, what: str) -> tuple[int, ...]:
    """Numbers below `count` from "all", a list, or ranges such as "0-3,-1" and "2-".

    Raises:
        PlanError: not of this form, or out of range.
    """
    if spec == "all":
        return tuple(range(count))
    parts = [str(n) for n in spec] if not isinstance(spec, str) else spec.split(",")
    found: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*(-?\d+)(?:(-)(-?\d+)?)?\s*", part)
        if match is None:
            raise PlanError(what, "'all', a list of numbers or ranges such as '0-3,-1'", spec)
        first = _inside(int(match[1]), count, what)
        last = first if match[2] is None else _inside(int(match[3] or count - 1), count, what)
        found += range(first, last + 1)
    if not found:
        raise PlanError(what, "at least one", spec)
    return tuple(sorted(set(found)))


def _inside(number: int, count: int, what: str) -> int:
    if not -count <= number < count:
        raise PlanError(what, f"numbers from {-count} to {count - 1}", number)
    return number % count
