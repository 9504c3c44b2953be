r"""AMP: a smaller model without the heads and feed-forward units that add least to the stream.

    head h:  1/N sum_n |o_nh W_h|_1        unit i:  1/N sum_n |u_ni|
    o_nh (E,): what head h gives, W_h (E,C): its rows of the output projection, u_ni: what enters
    the last map of the feed-forward part

One forward per passage, the mean over sequences. Every layer loses as many heads and units, its
weakest. `ratio` is of all parameters; heads go in the part p = ratio * parameters / (those of
attention and feed-forward), units in whatever is then missing. As published, units make up for the
rounding of heads one for one, though a head holds more parameters than a unit: `balance`.

Differs from the paper: it has one key head per query head. Here query heads go in whole groups with
the keys they share, by the sum of their sizes, or as the weakest members of every group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.answers import real_or_all
from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.linears import BlockLinears, blocks_of, weight_of
from regard.core.passage import Passage, passage_of
from regard.core.passing import by_head, passing
from regard.core.searcher import SearcherCard
from regard.probes.amp import contribution
from regard.searchers.configuring import admits
from regard.searchers.slimming import Kept, Pruned, parameters_of, pruned

Keys = Literal["groups", "members"]
Balance = Literal["parameters", "published"]


@dataclass(frozen=True, eq=False)
class Sizes:
    """How much heads (L,H) and units (L,I) add, mean over sequences."""

    heads: Tensor
    units: Tensor


@torch.no_grad()
def sizes(model: Any, passages: Sequence[Passage | Mapping[str, Any]]) -> Sizes:
    """Measure a model on passages, or on keyword arguments of its forward.

    Raises:
        ArgumentError: there is no passage.
    """
    if not passages:
        raise ArgumentError("passages", "at least one", 0)
    blocks = blocks_of(model)
    modules = {}
    for one in blocks:
        modules |= {f"{one.path} heads": one.joined, f"{one.path} units": one.back}
    slices: dict[str, Tensor] = {}
    heads, units = [], []
    for given in map(passage_of, passages):
        with passing(modules) as passed:
            model(**given.inputs)
        one_heads, one_units = [], []
        for one in blocks:
            joined, back = passed[f"{one.path} heads"][0], passed[f"{one.path} units"][0]
            real = real_or_all(given, joined)
            if one.path not in slices:
                slices[one.path] = by_head(one.joined, joined, one.site.heads)
            one_heads.append(contribution(joined, slices[one.path], real))
            one_units.append(_mean_size(back, real))
        heads.append(torch.stack(one_heads, 1))
        units.append(torch.stack(one_units, 1))
    return Sizes(torch.cat(heads).mean(0), torch.cat(units).mean(0))


def _mean_size(x: Tensor, real: Tensor) -> Tensor:
    """Mean |x| (B,I) of x (B,N,I) over real tokens (B,N)."""
    total = x.abs().masked_fill(~real[..., None], 0.0).sum(1, dtype=torch.float64)
    return total / real.sum(-1, keepdim=True)


def amp(
    model: Any,
    passages: Sequence[Passage | Mapping[str, Any]],
    ratio: float,
    *,
    keys: Keys = "groups",
    balance: Balance = "parameters",
    into: type | None = None,
) -> Pruned:
    """A model with about `ratio` of its parameters gone. into: as in `slim`; where the class takes
    only some numbers of heads, the nearest is taken, and units make up for the rest.

    Raises:
        ArgumentError: a ratio outside [0, 1), or larger than attention and feed-forward parts can
            give.
        UnsupportedError: a model of unknown parts.
    """
    if not 0 <= ratio < 1:
        raise ArgumentError("ratio", "a fraction in [0, 1)", ratio)
    blocks, total = blocks_of(model), parameters_of(model)
    room = sum(p.numel() for one in blocks for m in one.all for p in m.parameters())
    part = ratio * total / room
    if part >= 1:
        raise ArgumentError("ratio", f"below {room / total:.3g} for this model", ratio)
    found = sizes(model, passages)
    count, group = _heads_left(model, blocks[0], part, keys, into)
    heads = tuple(
        _strongest_heads(row, count, group, one)
        for row, one in zip(found.heads, blocks, strict=True)
    )
    gone = blocks[0].site.heads - len(heads[0])
    if balance == "published":
        site, width = blocks[0].site, blocks[0].width
        cut = round(width * (site.heads / width * (part - gone / site.heads) + part))
    else:
        spared = sum(_saved(one, kept) for one, kept in zip(blocks, heads, strict=True))
        cut = round((ratio * total - spared) / sum(_per_unit(one) for one in blocks))
    left = blocks[0].width - min(max(cut, 0), blocks[0].width - 1)
    units = tuple(_strongest(row, left) for row in found.units)
    return pruned(model, Kept(heads, units), into=into)


def _heads_left(
    model: Any, one: BlockLinears, part: float, keys: Keys, into: type | None
) -> tuple[int, int]:
    """How many groups of query heads stay, and members of each."""
    site = one.site
    whole = keys == "groups"
    size = site.kv_heads if whole else site.group
    wanted = max(1, size - round(part * size))

    def pair(count: int) -> tuple[int, int]:
        return (count, site.group) if whole else (site.kv_heads, count)

    for count in sorted(range(1, size + 1), key=lambda c: (abs(c - wanted), -c)):
        groups, members = pair(count)
        changes = {"num_attention_heads": groups * members, "num_key_value_heads": groups}
        if count == size or admits(model, changes, into):
            return groups, members
    return pair(size)


def _strongest_heads(
    sizes: Tensor, groups: int, members: int, one: BlockLinears
) -> tuple[int, ...]:
    """Query heads of the largest groups, and of each its largest members."""
    grouped = sizes.view(one.site.kv_heads, one.site.group)
    return tuple(
        group * one.site.group + member
        for group in _strongest(grouped.sum(1), groups)
        for member in _strongest(grouped[group], members)
    )


def _strongest(sizes: Tensor, count: int) -> tuple[int, ...]:
    """The `count` largest, in order; of equal ones the earlier."""
    return tuple(sorted(sizes.argsort(descending=True, stable=True)[:count].tolist()))


def _saved(one: BlockLinears, kept: tuple[int, ...]) -> int:
    """Parameters that go with the other heads of a layer."""
    groups = len({head // one.site.group for head in kept})
    shares = (len(kept) / one.site.heads, *[groups / one.site.kv_heads] * 2)
    found = 0.0
    for module, share in zip(one.heads, shares, strict=bool(one.heads)):
        found += (1 - share) * sum(p.numel() for p in module.parameters())
    return round(found + (1 - shares[0]) * weight_of(one.joined).numel())


def _per_unit(one: BlockLinears) -> int:
    """Parameters of one unit of a layer."""
    into_units = sum(p.numel() for m in one.units for p in m.parameters())
    return (into_units + weight_of(one.back).numel()) // one.width


CARD = SearcherCard(
    name="amp",
    build=amp,
    finds="model",
    papers=(Paper("2504.21174", "Efficient LLMs with AMP: Attention Heads and MLP Pruning", 2025),),
    claim=Claim(
        "a model without its weakest heads and units predicts text better than one without as many"
        " random ones",
        "regard study weakest_parts_first",
    ),
)
