"""Which sub-layers of a finished model turn its residual stream least, and a plan without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.hosting import host_of
from regard.core.moment import Site
from regard.importance.layer_similarity import Drops, dropped, dropped_in_turn, similarity
from regard.plan import Plan, Step

Stream = dict[str, tuple[Tensor, Tensor, Tensor]]
"""By attention module: the stream before it, after it, and after its block (B,N,C)."""
SUBLAYERS = ("attention", "mlp")


@torch.no_grad()
def sublayer_similarity(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Mean cosines (L,) of the stream before and after each attention part and each feed-forward
    part, over the real tokens of batches (keyword arguments of one forward, `attention_mask` among
    them if there is padding).

    Raises:
        ArgumentError: there is no batch.
        UnsupportedError: a block that does not add what its attention gives to its input.
    """
    sites = [s for s in host_of(model).sites(model) if s.causal and not s.cross]
    sums, tokens = torch.zeros(2, len(sites), dtype=torch.float64), 0
    for batch in batches:
        if not tokens:
            _check_residual(model, sites, batch)
        mask = batch.get("attention_mask")
        real = None if mask is None else mask.bool()
        with streams(model, sites) as found:
            model(**batch)
        count = found[sites[0].name][0].shape[:2].numel() if real is None else int(real.sum())
        for index, site in enumerate(sites):
            before, middle, after = found[site.name]
            sums[0, index] += count * similarity(before, middle, real).double().cpu()
            sums[1, index] += count * similarity(middle, after, real).double().cpu()
        tokens += count
    if not tokens:
        raise ArgumentError("batches", "one batch or more", 0)
    return dict(zip(SUBLAYERS, sums / tokens, strict=True))


@contextmanager
def streams(model: Any, sites: Iterable[Site]) -> Iterator[Stream]:
    """A context in which a forward leaves its residual stream at every site."""
    found: Stream = {}
    parts: dict[str, list[Tensor]] = {}
    handles = []
    for site in sites:
        seen = parts.setdefault(site.name, [])

        def enter(m: Any, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> None:
            seen[:] = [args[0] if args else kwargs["hidden_states"]]

        def pass_by(m: Any, args: Any, out: Any, seen: list[Tensor] = seen) -> None:
            seen.append(seen[0] + (out[0] if isinstance(out, tuple) else out))

        def leave(m: Any, args: Any, out: Any, name: str = site.name) -> None:
            before, middle = parts[name]
            found[name] = (before, middle, out[0] if isinstance(out, tuple) else out)

        block = model.get_submodule(site.name.rpartition(".")[0])
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(model.get_submodule(site.name).register_forward_hook(pass_by))
        handles.append(block.register_forward_hook(leave))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_residual(model: Any, sites: list[Site], batch: Mapping[str, Any]) -> None:
    """Without feed-forward parts a block must give its input plus what its attention gives."""
    plan = drop_plan(tuple(("mlp", site.layer) for site in sites))
    with plan.applied(model), streams(model, sites) as found:
        model(**batch)
    for name, (_, middle, after) in found.items():
        if not torch.allclose(middle, after, rtol=1e-3, atol=1e-3 * float(after.abs().amax())):
            raise UnsupportedError("layer similarity", f"the block of {name} is not pre-norm")


def drop_plan(drops: Drops) -> Plan:
    """The plan that leaves these sub-layers out."""
    layers = {part: sorted(i for name, i in drops if name == part) for part in SUBLAYERS}
    return Plan(
        name="layer drop",
        steps=tuple(
            Step(treatment="layer_drop", options={"sublayer": part}, layers=tuple(numbers))
            for part, numbers in layers.items()
            if numbers
        ),
    )


def least_needed(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    count: int,
    *,
    sublayers: tuple[str, ...] = ("attention",),
    in_turn: bool = False,
) -> Plan:
    """The plan that drops the `count` sub-layers that turn the stream least, of one kind or of both
    together; in_turn: measured again after each.
    """
    batches = list(batches)

    def measure(gone: Drops) -> dict[str, Tensor]:
        with drop_plan(gone).applied(model):
            found = sublayer_similarity(model, batches)
        return {name: found[name] for name in sublayers}

    drops = dropped_in_turn(measure, count) if in_turn else dropped(measure(()), count)
    return drop_plan(drops)
