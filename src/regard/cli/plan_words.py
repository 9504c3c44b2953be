"""A plan in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from regard.core.catalog import treatment

if TYPE_CHECKING:
    from regard.plan import Plan, Step


def told(plan: Plan, title: str) -> Iterator[str]:
    """Lines that say what a plan does, step by step, with the numbers its errors use."""
    title, made = f"{title}, {plan.name}" if plan.name else title, plan.made_for
    fits = "" if made is None else f", made for {made.model} of {made.layers} layers"
    yield f"{title}: {len(plan.steps)} {'step' if len(plan.steps) == 1 else 'steps'}{fits}"
    for index, step in enumerate(plan.steps):
        yield f"\n{index}: {step.treatment}{_options(step.options)}"
        yield f"   {treatment(step.treatment).summary}"
        yield f"   on {_heads(step)}, {_numbered('layer', step.layers)}{_modules(step)}"
        yield f"   in {' and '.join(step.phases)}"
        if step.build().neutral:
            yield "   changes nothing with these options: it is left out"
    if plan.storage is not None:
        kept = plan.storage.model_dump(exclude={"layers", "backend"}, exclude_none=True)
        where = _numbered("layer", plan.storage.layers)
        yield f"\nstorage: {plan.storage.backend}{_options(kept)}, {where}"


def _options(options: Mapping[str, Any]) -> str:
    found = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"({found})" if found else ""


def _heads(step: Step) -> str:
    if step.kv_heads is not None:
        return _numbered("key head", step.kv_heads) + " and the query heads they serve"
    return _numbered("head", "all" if step.heads is None else step.heads)


def _numbered(what: str, numbers: str | tuple[int, ...]) -> str:
    if numbers == "all":
        return f"all {what}s"
    said = numbers if isinstance(numbers, str) else ", ".join(map(str, numbers))
    return f"{what}s {said}"


def _modules(step: Step) -> str:
    return "" if step.modules is None else f", of the modules {step.modules}"
